"""A UNet2DModel with fewer layers, from the weights of the layers that stay."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from diffusers import UNet2DModel
from torch import Tensor

from diffkd.errors import UserError
from diffkd.models.families.unet2d import reinitialized_like

PLAIN = {  # block types and what they are without attention
    "AttnDownBlock2D": "DownBlock2D", "AttnUpBlock2D": "UpBlock2D",
    "AttnSkipDownBlock2D": "SkipDownBlock2D", "AttnSkipUpBlock2D": "SkipUpBlock2D",
}  # fmt: skip


def droppable(network: UNet2DModel) -> list[str]:
    """What can be named: layers, the attention of blocks, the innermost block, the innermost resolution.

    A resnet takes the attention beside it along. The innermost resolution is named by its down block.
    """
    names: list[str] = []
    for side in ("down_blocks", "up_blocks"):
        for i, block in enumerate(getattr(network, side)):
            names += [f"{side}.{i}.resnets.{j}" for j in range(len(block.resnets))]
            if network.config[_types(side)][i] in PLAIN:
                names.append(f"{side}.{i}.attentions")
    if network.mid_block is not None:
        names += ["mid_block"] + ["mid_block.attentions"] * bool(network.config.add_attention)
    if len(network.down_blocks) > 1:
        names.append(f"down_blocks.{len(network.down_blocks) - 1}")
    return names


def drop(network: UNet2DModel, patterns: Sequence[str]) -> UNet2DModel:
    """A new network without these, its config saying so: `save_pretrained` and `from_pretrained` know it.

    patterns: names of `droppable`, * standing for anything. The config of a UNet2DModel has one number of
    layers for all of its blocks, so as many resnets go from every block. Raises UserError for names that it
    has not, and for what the layers that stay do not fit without.
    """
    names = _matching(network, patterns)
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    blocks, layers = len(network.down_blocks), network.config.layers_per_block
    lost = blocks - 1 if f"down_blocks.{blocks - 1}" in names else blocks  # its number, or none's
    kept = {
        f"{side}.{i}": [j for j in range(len(block.resnets)) if f"{side}.{i}.resnets.{j}" not in names]
        for side in ("down_blocks", "up_blocks")
        for i, block in enumerate(getattr(network, side))
        if i != (lost if side == "down_blocks" else blocks - 1 - lost)
    }
    config["layers_per_block"] = layers - _dropped(kept, layers)
    for side in ("down_blocks", "up_blocks"):
        types = list(config[_types(side)])
        for i, kind in enumerate(types):
            if f"{side}.{i}.attentions" in names:
                types[i] = PLAIN[kind]
        config[_types(side)] = tuple(types[int(key.split(".")[1])] for key in kept if key.startswith(side))
    if "mid_block" in names:
        config["mid_block_type"] = None
    config["add_attention"] = bool(config["add_attention"]) and "mid_block.attentions" not in names
    if lost < blocks:
        widths = tuple(config["block_out_channels"])
        if widths[-1] != widths[-2]:
            raise UserError(
                f"down_blocks.{lost} has {widths[-1]} channels and down_blocks.{lost - 1} has {widths[-2]}: "
                "what is left would not fit together; drop layers of it, or use from_config"
            )
        config["block_out_channels"] = widths[:-1]
    smaller = reinitialized_like(network, **config)
    shift = int(lost < blocks)  # the first up block is gone with the last down block
    _fill(smaller, network, kept, shift)
    return smaller


def _types(side: str) -> str:
    return side.replace("blocks", "block_types")


def _matching(network: UNet2DModel, patterns: Sequence[str]) -> set[str]:
    known = droppable(network)
    found: set[str] = set()
    for pattern in patterns:
        matched = [name for name in known if fnmatchcase(name, pattern)]
        if not matched:
            raise UserError(
                f"student.blocks names {pattern!r}, which this network has not; it has {', '.join(known)}"
            )
        found.update(matched)
    return found


def _dropped(kept: dict[str, list[int]], layers: int) -> int:
    """How many layers go from every block."""
    whole = {key: layers + key.startswith("up") for key in kept}
    counts = {key: whole[key] - len(stay) for key, stay in kept.items()}
    most = max(counts.values())
    few = [key for key, count in counts.items() if count < most]
    if few:
        raise UserError(
            f"student.blocks drops {most} resnets of some blocks and {counts[few[0]]} of {few[0]}; a "
            "UNet2DModel has one number of layers for all, so drop as many of each block (* is any number)"
        )
    if most >= layers:
        raise UserError(
            f"student.blocks drops {most} resnets of blocks that have {layers}; one has to stay in each"
        )
    return most


def _fill(smaller: UNet2DModel, network: UNet2DModel, kept: dict[str, list[int]], shift: int) -> None:
    """The weights of the layers that stay, into their new places."""
    old: dict[str, Tensor] = network.state_dict()
    found: dict[str, Any] = {}
    for name, value in smaller.state_dict().items():
        source = _source(name, kept, shift)
        if source not in old or old[source].shape != value.shape:
            raise UserError(
                f"student.blocks: {_layer(source)} does not fit in the place of {_layer(name)} "
                f"({_shape(old.get(source))} for {_shape(value)}); drop a layer that changes no width"
            )
        found[name] = old[source]
    smaller.load_state_dict(found)


def _source(name: str, kept: dict[str, list[int]], shift: int) -> str:
    """The teacher's name of a parameter."""
    parts = name.split(".")
    if parts[0] == "up_blocks":
        parts[1] = str(int(parts[1]) + shift)
    if parts[0].endswith("_blocks") and parts[2] in ("resnets", "attentions"):
        parts[3] = str(kept[f"{parts[0]}.{parts[1]}"][int(parts[3])])
    return ".".join(parts)


def _layer(name: str) -> str:
    return ".".join(name.split(".")[:4])


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else "x".join(map(str, tensor.shape))
