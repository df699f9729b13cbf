"""Checks of untrusted pipeline files, before diffusers reads them: configs, weights, components."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from diffkd.errors import UserError
from diffkd.io.naming import called
from diffkd.io.text import log, quoted
from diffkd.models.pipeline_files import MAX_NUMBER, read_object, tensor_sizes, variants_of, weights_of
from diffkd.models.quantization import is_opened

MAX_TIMESTEPS = 100_000  # T: nobody uses longer tables, and they would fill the memory
MAX_SIDE = 1 << 14  # of an image
EMA_STATE = frozenset(  # that diffusers' EMAModel keeps in the config of its network
    ("decay", "min_decay", "inv_gamma", "power", "optimization_step", "update_after_step", "use_ema_warmup")
)


def check_network(
    kind: Any, place: Path, name: str, *, variant: str | None = None, whole: bool = False
) -> str | None:
    """The variant of the weights that is read (see `weights_of`).

    Raises UserError where a config describes a network much larger than its weights. The network is built on
    the meta device, so that no memory is taken. whole: refuse a network that is larger or smaller at all.
    """
    variant, files = weights_of(place, name, variant)
    known = inspect.signature(kind.__init__).parameters
    config = {k: v for k, v in read_object(place / "config.json").items() if not k.startswith("_")}
    quantization = config.pop("quantization_config", None)
    if quantization and (whole or not is_opened(quantization)):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UserError(
            f"{name}: the weights in {place} are quantized by {quoted(method)}, and are not opened; take the "
            f"weights that they were made of ({called('quantize')} int8 makes 8 bits of them again), or open "
            "the network in diffusers, and network.dequantize().save_pretrained(folder)"
        )
    _say_unknown(config.keys() - known.keys() - EMA_STATE, config, place / "config.json")
    config = {key: value for key, value in config.items() if key in known}
    counts = [count for file in files for _, count in tensor_sizes(file)]
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
    if whole and sum(counts) > sum(tensor.numel() for tensor in network.state_dict().values()):
        raise UserError(
            f"{name}: the weights in {place} are {sum(counts):,}, more than its config.json has a place for "
            f"({needed:,}); give the config that they were trained with"
        )
    if needed > (sum(counts) if whole else 2 * sum(counts) + MAX_NUMBER):
        raise UserError(
            f"{name}: the config in {place} has {needed:,} parameters and the weights are {sum(counts):,}; "
            "are they complete?"
        )
    return variant


def _say_unknown(keys: Iterable[str], config: Mapping[str, Any], path: Path) -> None:
    """Fields that the installed diffusers does not know do nothing there, and so nothing here."""
    for key in sorted(keys):
        if config[key] not in (None, False):
            log.warning(
                "%s has %s %s, which the installed diffusers does not know and ignores", path, quoted(key),
                quoted(config[key]),
            )  # fmt: skip


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


def check_components(
    folder: Path, index: Mapping[str, Any], name: str, variant: str | None = None
) -> str | None:
    """The variant of the weights that has to be named to diffusers (see `weights_of`), None for none.

    Raises UserError where opening a pipeline would run code from its folder or import a package that it
    names, and for components that the checks above refuse.
    """
    import diffusers

    read = set[str | None]()
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
            wanted = variant if variant in variants_of(place) else None
            # whole: diffusers would fill missing weights with random numbers
            read.add(check_network(kind, place, name, variant=wanted, whole=True))
        elif (place / "scheduler_config.json").is_file():
            check_scheduler(read_object(place / "scheduler_config.json"), name)
    if variant is not None and variant not in read:
        raise UserError(
            f"{name} has no weights of {called('variant')} {variant}; leave it out, or name one that it has"
        )
    return variant or next((found for found in read if found), None)


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
