"""A pipeline's files, as anybody may have written them: what of them is read, and what is refused before
diffusers sees it."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.attention_processor import Attention
from safetensors import SafetensorError, safe_open

from diffkd.errors import UserError
from diffkd.io.text import from_json, quoted, reason

INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LARGEST = 1 << 20  # of a number in a config, T and the sides of an image apart
MAX_TIMESTEPS = 100_000  # T: longer tables are nobody's, and would fill the memory
LONGEST_SIDE = 1 << 14


def read_object(path: Path) -> dict[str, Any]:
    """Raises UserError for what is no JSON object."""
    try:
        content = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({reason(error)}); is the pipeline complete?"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; is the pipeline complete?")
    return content


def check_weights(place: Path, name: str) -> None:
    """Raises UserError where a component has no safetensors, or an index that `check_index` refuses."""
    if not any(place.glob("*.safetensors")):
        pickled = sorted(p.name for p in place.glob("*") if p.suffix in PICKLED)
        there = f", only {pickled[0]}" if pickled else ""
        raise UserError(
            f"{name} has no safetensors weights ({place / WEIGHTS}){there}, and pickled ones are never "
            "opened; where the source is trusted, convert them with "
            "pipeline.save_pretrained(folder, safe_serialization=True)"
        )
    check_index(place)


def check_index(place: Path) -> None:
    """Raises UserError where an index of weights in several files names others than those beside it."""
    for index in place.glob("*.safetensors.index.json"):
        files = read_object(index).get("weight_map")
        for file in files.values() if isinstance(files, dict) else [files]:
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise UserError(
                    f"{index} names {quoted(file)}, which is no safetensors file beside it; "
                    "is the pipeline complete?"
                )


def check_network(kind: Any, place: Path, name: str, *, whole: bool = False) -> None:
    """Raises UserError where a config asks for a network much larger than its weights are, before there is
    memory taken for it: the network is made without any first. whole: where it is larger at all."""
    config = {k: v for k, v in read_object(place / "config.json").items() if not k.startswith("_")}
    counts = list(sizes(place))
    for key, value in _leaves(config):
        least = 0 if "block" in key or "channels" in key or "layers" in key else -LARGEST
        most = LONGEST_SIDE if "size" in key else len(counts) if "layers" in key else LARGEST
        if isinstance(value, int | float) and not least <= value <= most:
            raise UserError(f"{name}: {place / 'config.json'} has {key} {quoted(value)}; is it complete?")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # which is refused next
        network = kind.from_config(config)
    if any(isinstance(part, Attention) and part.heads < 1 for part in network.modules()):
        raise UserError(
            f"{name}: {place / 'config.json'} has heads of attention_head_dim "
            f"{quoted(config.get('attention_head_dim'))}, wider than the channels there are; repair it"
        )
    needed = sum(p.numel() for p in network.parameters())
    if needed > (sum(counts) if whole else 2 * sum(counts) + LARGEST):
        raise UserError(
            f"{name}: the config in {place} is of {needed:,} parameters and the weights are {sum(counts):,}; "
            "are they complete?"
        )


def check_scheduler(config: Mapping[str, Any], name: str) -> None:
    """Raises UserError for tables that would fill the memory."""
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
        raise UserError(f"{name} has trained_betas {quoted(trained)}; they are numbers from 0 to 1")


def check_components(folder: Path, index: Mapping[str, Any], name: str) -> None:
    """Raises UserError where opening a pipeline would run code from its folder, or import a package that it
    names, and for components that `check_network` and the like refuse."""
    for component, entry in index.items():
        if component.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        place, library = folder / component, entry[0]
        kind = getattr(diffusers, str(entry[-1]), None) if library == "diffusers" else None
        own = (place / f"{library}.py").is_file()  # would be run in the library's place
        if len(entry) != 2 or not inspect.isclass(kind) or Path(component).name != component or own:
            raise UserError(
                f"{name} has {quoted(component)} of {quoted(entry)}{' in a file of its own' * own}, and only "
                "classes of diffusers are opened: any other could run code of the pipeline's"
            )
        if issubclass(kind, diffusers.ModelMixin):
            check_weights(place, name)
            check_network(kind, place, name, whole=True)  # diffusers fills up with random numbers
        elif (place / "scheduler_config.json").is_file():
            check_scheduler(read_object(place / "scheduler_config.json"), name)


def sizes(place: Path) -> Iterator[int]:
    """How many numbers each tensor of the weights has."""
    for file in place.glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as tensors:
                names: list[str] = tensors.keys()
                for key in names:
                    yield math.prod(tensors.get_slice(key).get_shape())
        except SafetensorError:
            continue  # if it is one that is read, it is refused then


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, str(name))
    elif isinstance(value, list):
        yield f"{key}: a list of layers of length", len(value)
        for inner in value:
            yield from _leaves(inner, key)
    else:
        yield key, value
