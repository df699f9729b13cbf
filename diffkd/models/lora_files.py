"""Adapters on disk: written for stock pipelines and other programs, read and checked against their base."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffkd.core.adapters import DOWN, UP, Adapter
from diffkd.errors import UserError
from diffkd.io.text import quoted, reason
from diffkd.models import fingerprints, pipeline_files
from diffkd.models.source import ADAPTER, CARD, Source, find
from diffkd.models.students import lora

KOHYA = "kohya_lora_weights.safetensors"  # stock diffusers opens the other of the two
WHY_MERGED = "it learned with one more number as an input, for which no LoRA file has weights"


class Keys(NamedTuple):
    """What a family's adapters are called in files.

    prefix: of the keys that its pipeline's load_lora_weights reads. kohya: of those that other programs
    read, None where they read the first. comfy_alone: whether these are ComfyUI's alone, and A1111 and stock
    diffusers draw the base for them, or a part of the adapter. call: arguments of the pipeline's call beside
    the family's own, with which it draws a student that is an adapter.
    """

    prefix: str
    kohya: str | None = None
    comfy_alone: bool = False
    call: Mapping[str, Any] = {}


def facts(adapter: Adapter) -> dict[str, Any]:
    """What a card says of a student's adapter and of its base. Raises UserError where that is gone."""
    options = {"variant": adapter.variant, "guidance": adapter.guidance}
    return {
        "rank": adapter.rank,
        "targets": [*adapter.targets],
        "base": os.path.abspath(adapter.base) if os.path.isdir(adapter.base) else adapter.base,
        "fingerprint": fingerprint(find(adapter.base, adapter.variant)),
        **{key: value for key, value in options.items() if value is not None},
    }


def fingerprint(base: Source) -> str:
    """A hash of the network of a model: of its config and its weights, wherever they lie."""
    place = base.place_of("unet" if "unet" in base.index else "transformer")
    _, files = pipeline_files.weights_of(place, base.name, base.variant)
    return fingerprints.of_files([place / "config.json", *files])


def check_base(source: Source) -> None:
    """Raises UserError where the base of an adapter is not the one that it was trained on."""
    said = source.card["lora"]
    if said["fingerprint"] != fingerprint(source):
        raise UserError(
            f"{source.adapter} is an adapter for another base than {source.name} is now: the weights differ "
            f"from those that it was trained on; put these back, or name their place as base in its {CARD}"
        )


def write(network: nn.Module, keys: Keys | None, folder: Path) -> None:
    """The adapter of a network: its file, and the one for other programs, where the family has one.

    Keys are peft's own: what diffusers' converters make of them, stock opens without an error and draws
    something else. alpha is the rank, so a reader that knows no alpha scales as one that does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.cpu().contiguous() for name, value in lora.weights_of(network).items()}
    prefix = "" if keys is None else f"{keys.prefix}."
    save_file({f"{prefix}{name}": value for name, value in weights.items()}, folder / ADAPTER, _METADATA)
    if keys is not None and keys.kohya is not None:
        save_file(to_kohya(weights, keys.kohya), folder / KOHYA, _METADATA)


_METADATA = {"format": "pt"}


def to_kohya(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same weights as kohya's sd-scripts name them: PREFIX_LAYER.lora_down.weight, .lora_up.weight and
    .alpha, the dots of a layer's name replaced by _."""
    made: dict[str, Tensor] = {}
    for name, value in weights.items():
        layer, _, last = name.rpartition(DOWN if DOWN in name else UP)
        key = f"{prefix}_{layer.replace('.', '_')}"
        made[f"{key}.{'lora_down' if DOWN in name else 'lora_up'}.{last}"] = value
        if DOWN in name:
            made[f"{key}.alpha"] = torch.tensor(float(len(value)))
    return made


def read(folder: Path, network: nn.Module, rank: int) -> dict[str, Tensor]:
    """The weights of the adapter in a folder, by peft's names within the network (see `lora.weights_of`).

    Raises UserError for a file that is not one of this network, of this rank.
    """
    path = folder / ADAPTER
    try:
        content = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({reason(error)}); is it complete?") from error
    weights = unprefixed(content)
    for name in weights:
        _check(path, name, weights, network, rank)
    return weights


def unprefixed(content: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an adapter's file by their names within the network."""
    weights: dict[str, Tensor] = {}
    for key, value in content.items():
        found = next((prefix for prefix in ("unet.", "transformer.") if key.startswith(prefix)), "")
        weights[key.removeprefix(found)] = value
    return weights


def _check(path: Path, name: str, weights: Mapping[str, Tensor], network: nn.Module, rank: int) -> None:
    other = name.replace(DOWN, UP) if DOWN in name else name.replace(UP, DOWN)
    layer = name.rpartition(DOWN if DOWN in name else UP)[0]
    try:
        module: Any = network.get_submodule(layer)
    except AttributeError:
        module = None
    if not lora.takes_adapter(module) or other not in weights or other == name:
        raise UserError(
            f"{path} has {quoted(name)}, which is no adapter of a layer of its base; is it of another model?"
        )
    out, *inner = module.weight.shape
    shape = (rank, *inner) if DOWN in name else (out, rank, *(1 for _ in inner[1:]))
    value = weights[name]
    if tuple(value.shape) != shape or not value.is_floating_point():
        raise UserError(
            f"{path} has {quoted(name)} of shape {tuple(value.shape)}, and its base wants {shape}; is it of "
            "another model?"
        )
