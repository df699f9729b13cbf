"""The network of a pipeline, read from untrusted files, whatever its class."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffkd.errors import UserError
from diffkd.io.text import quoted
from diffkd.models import validation
from diffkd.models.pipeline_files import read_object
from diffkd.models.source import Source


def read(
    source: Source,
    component: str,
    kind: Any,
    check: Callable[[dict[str, Any], str], None] | None = None,
    *,
    once: str | None = None,
) -> Any:
    """The network of this class that a pipeline calls `component`, in float32.

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
        raise UserError(
            f"{source.name} has a network of type {quoted(entry)}, which is not supported; supported is "
            f"{kind.__name__}"
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
        if check is not None:
            check(read_object(place / "config.json"), name)
        network, loading = kind.from_pretrained(
            place, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True, variant=variant
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
        raise UserError("a stock pipeline cannot hold 8-bit weights; save the model loaded without quantize")
    # safetensors needs it, and on a GPU it is another
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
