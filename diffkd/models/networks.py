"""The network of a pipeline, read from untrusted files, whatever its class."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffkd.errors import UserError
from diffkd.io.text import quoted
from diffkd.models import quantization, validation
from diffkd.models.installed import dtype_argument
from diffkd.models.pipeline_files import MAX_NUMBER, forget_origin, read_object
from diffkd.models.source import Source


def read(
    source: Source,
    component: str,
    kind: Any,
    check: Callable[[dict[str, Any], str], None] | None = None,
    *,
    once: str | None = None,
) -> Any:
    """The network of this class that a pipeline calls `component`, in float32; integer weights stay integers.

    once: what the class was called by earlier versions of diffusers. check: given the config and the model's
    name, before memory is taken. Raises UserError for another class, and for weights that are not whole, or
    not those of the config.
    """
    check_kind(source, component, kind, once=once)
    return read_from(source.place_of(component), source.name, kind, source.variant, check)


def check_kind(source: Source, component: str, kind: Any, *, once: str | None = None) -> None:
    """Raises UserError for a pipeline whose `component` is of another class, by its index."""
    entry = source.index.get(component, ["diffusers", kind.__name__])
    if not isinstance(entry, list) or entry[-1:] not in ([kind.__name__], [once or kind.__name__]):
        of_videos = ", one of videos" if isinstance(entry, list) and "3D" in str(entry[-1:]) else ""
        raise UserError(
            f"{source.name} has a network of type {quoted(entry)}{of_videos}, which is not supported; "
            f"supported is {kind.__name__}"
        )


def read_from(
    place: Path,
    name: str,
    kind: Any,
    variant: str | None = None,
    check: Callable[[dict[str, Any], str], None] | None = None,
) -> Any:
    """The same from a folder. name: what messages call the model."""
    with readable(place, name):
        variant = validation.check_network(kind, place, name, variant=variant)
        config = read_object(place / "config.json")
        if check is not None:
            check(config, name)
        integers = bool(config.get("quantization_config"))
        how = {dtype_argument(): torch.float32} if integers else {"low_cpu_mem_usage": False}
        network, loading = kind.from_pretrained(
            place, use_safetensors=True, output_loading_info=True, variant=variant, **how
        )
    if loading["missing_keys"]:
        raise UserError(
            f"{name}: the weights in {place} lack {loading['missing_keys'][0]}; are they complete?"
        )
    if loading["unexpected_keys"]:
        raise UserError(
            f"{name}: the weights in {place} hold {loading['unexpected_keys'][0]}, of which its config.json "
            "knows nothing; give the config that they were trained with"
        )
    forget_origin(network)
    if integers:
        quantization.cast(network, torch.float32)
    else:
        nn.Module.float(network)  # diffusers keeps the dtype of weights that differ from the others
    return network


@contextmanager
def readable(place: Path, name: str) -> Iterator[None]:
    """Raises UserError where the network in this folder cannot be built: diffusers raises many types for an
    invalid config. name: what the message calls the model."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:300].removesuffix("; is it complete?")
        raise UserError(f"{name}: the network in {place} cannot be read ({why}); is it complete?") from error


def config_of(place: Path, kind: Any) -> dict[str, Any]:
    """The config of a network that is still to be read, with the values that it does not name."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.default is not one.empty}
    return {**defaults, **read_object(place / "config.json")}


def check_supported(config: Any, name: str, supported: dict[str, tuple[Any, ...]]) -> None:
    """Raises UserError where a network's config has a value that is not among the supported ones."""
    for key, values in supported.items():
        if config.get(key) not in values:
            raise UserError(
                f"{name} has {key} {quoted(config.get(key))}, which is not supported; supported is "
                f"{' or '.join(map(str, values))}"
            )


def check_counts(config: Mapping[str, Any], name: str, keys: Iterable[str]) -> None:
    """Raises UserError where one of these is not a positive integer."""
    for key in keys:
        if not (type(config[key]) is int and config[key] > 0):
            raise UserError(f"{name} has {key} {quoted(config[key])}; supported is a positive integer")


def check_variance(config: Mapping[str, Any], name: str) -> None:
    """Raises UserError for a network whose output is neither its prediction nor that and a variance."""
    given, made = config["in_channels"], config["out_channels"]
    if made not in (None, given, 2 * given):
        raise UserError(
            f"{name} has in_channels {given} and out_channels {quoted(made)}; supported are as many, or "
            "twice as many for a learned variance"
        )


def check_tokens(config: Mapping[str, Any], name: str, most: int) -> None:
    """Raises UserError for a network of a sample_size that is no whole number of patches, or of too many."""
    side, patch = config["sample_size"], config["patch_size"]
    if side % patch:
        raise UserError(f"{name} has sample_size {side}, which does not divide by its patch_size {patch}")
    if (tokens := (side // patch) ** 2) > most:
        raise UserError(
            f"{name} has sample_size {side} and patch_size {patch}, which are {tokens:,} tokens; supported "
            f"are up to {most:,}"
        )


def check_positions(config: Mapping[str, Any], name: str, key: str, tokens: int) -> None:
    """Raises UserError for a network without positions for so many tokens of a prompt, and for rows and
    columns of an image; key: of the three numbers of them."""
    given = config[key]
    if not (
        isinstance(given, list | tuple)
        and len(given) == 3
        and all(type(one) is int and 0 < one <= MAX_NUMBER for one in given)
        and given[0] > tokens
    ):
        raise UserError(
            f"{name} has {key} {quoted(given)}; supported are three integers, places for more than the "
            f"{tokens} tokens of a prompt, for rows and for columns"
        )


def check_sample_size(config: Any, name: str) -> None:
    """Raises UserError for a sample_size that is neither missing, nor a side, nor height and width."""
    size = config.get("sample_size")
    sides = (size, size) if type(size) is int else size
    if size is not None and not (
        isinstance(sides, tuple | list)
        and len(sides) == 2
        and all(type(side) is int and side > 0 for side in sides)
    ):
        raise UserError(
            f"{name} has sample_size {quoted(size)}; supported is a positive integer, or height and width"
        )


def check_saved(network: nn.Module) -> None:
    """Raises UserError for a network that a stock pipeline cannot hold. It is made contiguous."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if any(map(is_traceable_wrapper_subclass, network.parameters())):
        raise UserError(
            "a stock pipeline is not written with weights that are in 8 bits already; save the model loaded "
            "without quantize, or export the one that they were made of"
        )
    # safetensors needs it, and on a GPU it is another
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
