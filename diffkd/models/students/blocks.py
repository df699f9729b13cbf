"""Students with fewer layers: a UNet2DModel rebuilt from the layers that stay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from diffusers import UNet2DModel
from torch import Tensor

from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.models.students.copies import unet_of, with_network
from diffkd.models.unet import reinitialized_like

WITHOUT_ATTENTION = {  # block types
    "AttnDownBlock2D": "DownBlock2D", "AttnUpBlock2D": "UpBlock2D",
    "AttnSkipDownBlock2D": "SkipDownBlock2D", "AttnSkipUpBlock2D": "SkipUpBlock2D",
}  # fmt: skip


def drop_blocks(teacher: Denoiser, blocks: Iterable[str]) -> Denoiser:
    """The teacher without these layers or blocks (named as in `droppable`); the others keep their weights.

    Raises UserError for a name that the network does not have, listing those it has, and where the remaining
    layers do not fit together.
    """
    return with_network(teacher, drop_layers(unet_of(teacher), list(blocks)))


def droppable(network: UNet2DModel) -> list[str]:
    """The names that can be dropped: layers, a block's attention, the middle, the innermost resolution.

    A resnet takes the attention beside it along. The innermost resolution is named by its down block.
    """
    names: list[str] = []
    for side in ("down_blocks", "up_blocks"):
        for i, block in enumerate(getattr(network, side)):
            names += [f"{side}.{i}.resnets.{j}" for j in range(len(block.resnets))]
            if network.config[_types(side)][i] in WITHOUT_ATTENTION:
                names.append(f"{side}.{i}.attentions")
    if network.mid_block is not None:
        names += ["mid_block"] + ["mid_block.attentions"] * bool(network.config.add_attention)
    if len(network.down_blocks) > 1:
        names.append(f"down_blocks.{len(network.down_blocks) - 1}")
    return names


def drop_layers(network: UNet2DModel, patterns: Sequence[str]) -> UNet2DModel:
    """A new network without these blocks; its config describes it, so it is saved and loaded as usual.

    patterns: names of `droppable`, in which * matches anything. The config of a UNet2DModel has one number of
    layers for all blocks, so the same number of resnets must go from each. Raises UserError for names that
    the network does not have, and where the remaining layers do not fit together.
    """
    names = _matching(network, patterns)
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    blocks, layers = len(network.down_blocks), network.config.layers_per_block
    lost = blocks - 1 if f"down_blocks.{blocks - 1}" in names else blocks  # down block; `blocks` for none
    kept = {
        f"{side}.{i}": [j for j in range(len(block.resnets)) if f"{side}.{i}.resnets.{j}" not in names]
        for side in ("down_blocks", "up_blocks")
        for i, block in enumerate(getattr(network, side))
        if i != (lost if side == "down_blocks" else blocks - 1 - lost)
    }
    config["layers_per_block"] = layers - _dropped_per_block(kept, layers)
    for side in ("down_blocks", "up_blocks"):
        types = list(config[_types(side)])
        for i, kind in enumerate(types):
            if f"{side}.{i}.attentions" in names:
                types[i] = WITHOUT_ATTENTION[kind]
        config[_types(side)] = tuple(types[int(key.split(".")[1])] for key in kept if key.startswith(side))
    if "mid_block" in names:
        config["mid_block_type"] = None
    config["add_attention"] = bool(config["add_attention"]) and "mid_block.attentions" not in names
    if lost < blocks:
        widths = tuple(config["block_out_channels"])
        if widths[-1] != widths[-2]:
            raise UserError(
                f"down_blocks.{lost} has {widths[-1]} channels and down_blocks.{lost - 1} has {widths[-2]}: "
                "the remaining blocks would not fit together; drop layers of it, or use from_config"
            )
        config["block_out_channels"] = widths[:-1]
    smaller = reinitialized_like(network, **config)
    _copy_weights(smaller, network, kept, shift=int(lost < blocks))
    return smaller


def _types(side: str) -> str:
    return side.replace("blocks", "block_types")


def _matching(network: UNet2DModel, patterns: Sequence[str]) -> set[str]:
    """The droppable names that the patterns match."""
    known = droppable(network)
    names: set[str] = set()
    for pattern in patterns:
        matched = [name for name in known if fnmatchcase(name, pattern)]
        if not matched:
            raise UserError(
                f"student.blocks names {pattern!r}, which this network does not have; it has "
                f"{', '.join(known)}"
            )
        names.update(matched)
    return names


def _dropped_per_block(kept: dict[str, list[int]], layers: int) -> int:
    """The number of resnets dropped from each block, which must be the same for all."""
    total = {key: layers + key.startswith("up") for key in kept}
    counts = {key: total[key] - len(stay) for key, stay in kept.items()}
    most = max(counts.values())
    fewer = [key for key, count in counts.items() if count < most]
    if fewer:
        raise UserError(
            f"student.blocks drops {most} resnets of some blocks and {counts[fewer[0]]} of {fewer[0]}; a "
            "UNet2DModel has one number of layers for all, so drop as many from each block (* matches any)"
        )
    if most >= layers:
        raise UserError(
            f"student.blocks drops {most} resnets of blocks that have {layers}; at least one must stay in "
            "each"
        )
    return most


def _copy_weights(smaller: UNet2DModel, network: UNet2DModel, kept: dict[str, list[int]], shift: int) -> None:
    """From the layers that stay to their new places. shift: of up blocks, the first of which may be gone."""
    old: dict[str, Tensor] = network.state_dict()
    weights: dict[str, Any] = {}
    for name, value in smaller.state_dict().items():
        source = _name_in_teacher(name, kept, shift)
        if source not in old or old[source].shape != value.shape:
            raise UserError(
                f"student.blocks: {_layer(source)} does not fit in place of {_layer(name)} "
                f"({_shape(old.get(source))} for {_shape(value)}); drop a layer that keeps the width"
            )
        weights[name] = old[source]
    smaller.load_state_dict(weights)


def _name_in_teacher(name: str, kept: dict[str, list[int]], shift: int) -> str:
    """The teacher's name for a parameter of the student."""
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
