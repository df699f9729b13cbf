"""Checks of untrusted pipeline files, before diffusers reads them: configs, weights, components."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from diffkd.errors import UserError
from diffkd.io.text import from_json, quoted, reason

INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_NUMBER = 1 << 20  # in a config, other than T and the sides of an image
MAX_TIMESTEPS = 100_000  # T: nobody uses longer tables, and they would fill the memory
MAX_SIDE = 1 << 14  # of an image


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError for anything else."""
    try:
        content = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({reason(error)}); is the pipeline complete?"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object; is the pipeline complete?")
    return content


def check_weights(place: Path, name: str) -> None:
    """Raises UserError where a component has no safetensors, or an index that `check_index` refuses."""
    if not any(place.glob("*.safetensors")):
        pickled = sorted(p.name for p in place.glob("*") if p.suffix in PICKLE_SUFFIXES)
        there = f", only {pickled[0]}" if pickled else ""
        raise UserError(
            f"{name} has no safetensors weights ({place / WEIGHTS}){there}, and pickled ones are never "
            "opened; if you trust the source, convert them with "
            "pipeline.save_pretrained(folder, safe_serialization=True)"
        )
    check_index(place)


def check_index(place: Path) -> None:
    """Raises UserError where the index of sharded weights names anything but safetensors files beside it."""
    for index in place.glob("*.safetensors.index.json"):
        files = read_object(index).get("weight_map")
        for file in files.values() if isinstance(files, dict) else [files]:
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise UserError(
                    f"{index} names {quoted(file)}, which is not a safetensors file beside it; "
                    "is the pipeline complete?"
                )


def check_network(kind: Any, place: Path, name: str, *, whole: bool = False) -> None:
    """Raises UserError where a config describes a network much larger than its weights. The network is built
    on the meta device, so that no memory is taken. whole: refuse a network that is larger at all."""
    config = {k: v for k, v in read_object(place / "config.json").items() if not k.startswith("_")}
    counts = list(tensor_sizes(place))
    for key, value in _flatten(config):
        least = 0 if "block" in key or "channels" in key or "layers" in key else -MAX_NUMBER
        most = MAX_SIDE if "size" in key else len(counts) if "layers" in key else MAX_NUMBER
        if isinstance(value, int | float) and not least <= value <= most:
            raise UserError(f"{name}: {place / 'config.json'} has {key} {quoted(value)}; is it complete?")
    from diffusers.models.attention_processor import Attention

    with torch.device("meta"), warnings.catch_warnings():
        # of a network that is refused below
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        network = kind.from_config(config)
    if any(isinstance(part, Attention) and part.heads < 1 for part in network.modules()):
        raise UserError(
            f"{name}: {place / 'config.json'} has heads of attention_head_dim "
            f"{quoted(config.get('attention_head_dim'))}, wider than the channels where attention is; "
            "repair it"
        )
    needed = sum(p.numel() for p in network.parameters())
    if needed > (sum(counts) if whole else 2 * sum(counts) + MAX_NUMBER):
        raise UserError(
            f"{name}: the config in {place} has {needed:,} parameters and the weights are {sum(counts):,}; "
            "are they complete?"
        )


def check_scheduler(config: Mapping[str, Any], name: str) -> None:
    """Raises UserError for noise tables that are invalid or would fill the memory."""
    steps, trained = config.get("num_train_timesteps", 1000), config.get("trained_betas")
    if type(steps) is not int or not 1 <= steps <= MAX_TIMESTEPS:
        raise UserError(
            f"{name} has num_train_timesteps {quoted(steps)}; supported are 1 to {MAX_TIMESTEPS} time steps"
        )
    if trained is not None and not (
        isinstance(trained, list)
        and 1 <= len(trained) <= MAX_TIMESTEPS
        and all(type(beta) in (int, float) and 0 <= beta <= 1 for beta in trained)
    ):
        raise UserError(
            f"{name} has trained_betas {quoted(trained)}; supported is a list of numbers from 0 to 1"
        )


def check_components(folder: Path, index: Mapping[str, Any], name: str) -> None:
    """Raises UserError where opening a pipeline would run code from its folder or import a package that it
    names, and for components that the checks above refuse."""
    import diffusers

    for component, entry in index.items():
        if component.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        place, library = folder / component, entry[0]
        kind = getattr(diffusers, str(entry[-1]), None) if library == "diffusers" else None
        local = (place / f"{library}.py").is_file()  # would be run in the library's place
        if len(entry) != 2 or not inspect.isclass(kind) or Path(component).name != component or local:
            raise UserError(
                f"{name} has {quoted(component)} of {quoted(entry)}{' in a file of its own' * local}, and "
                "only classes of diffusers are opened: any other could run code from the pipeline's folder"
            )
        if issubclass(kind, diffusers.ModelMixin):
            check_weights(place, name)
            # whole: diffusers would fill missing weights with random numbers
            check_network(kind, place, name, whole=True)
        elif (place / "scheduler_config.json").is_file():
            check_scheduler(read_object(place / "scheduler_config.json"), name)


def tensor_sizes(place: Path) -> Iterator[int]:
    """The number of elements of every tensor in a folder's safetensors files."""
    for file in place.glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as tensors:
                names: list[str] = tensors.keys()
                for key in names:
                    yield math.prod(tensors.get_slice(key).get_shape())
        except SafetensorError:
            continue  # refused when it is loaded, if it is


def _flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The innermost values of a config with their keys; lists yield their length too."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flatten(inner, str(name))
    elif isinstance(value, list):
        yield f"{key}: a list of layers of length", len(value)
        for inner in value:
            yield from _flatten(inner, key)
    else:
        yield key, value
