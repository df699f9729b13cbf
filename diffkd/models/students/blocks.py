"""Students with fewer layers: a UNet rebuilt from the layers that stay, or a transformer of fewer blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from diffusers import UNet2DModel
from torch import Tensor

from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.io.text import a_or_an
from diffkd.models.students import resolutions
from diffkd.models.students.bk_sdm import dropped_by
from diffkd.models.students.copies import unet_of, with_network
from diffkd.models.students.resolutions import SIDES, Kept
from diffkd.models.students.transformers import spread, stock_name, without
from diffkd.models.unet import UNet, config_of, reinitialized_like

WITHOUT_ATTENTION = {  # types of blocks
    "AttnDownBlock2D": "DownBlock2D", "AttnUpBlock2D": "UpBlock2D",
    "AttnSkipDownBlock2D": "SkipDownBlock2D", "AttnSkipUpBlock2D": "SkipUpBlock2D",
    "CrossAttnDownBlock2D": "DownBlock2D", "CrossAttnUpBlock2D": "UpBlock2D",
    "UNetMidBlock2DCrossAttn": "UNetMidBlock2D",
}  # fmt: skip


def drop_blocks(teacher: Denoiser, blocks: Iterable[str] | str) -> Denoiser:
    """The teacher without these layers or blocks; the others keep their weights.

    blocks: of a UNet names as in `droppable`, of a transformer such as transformer_blocks.3, in which *
    matches anything; or base, small or tiny, as BK-SDM has them for UNets. Raises UserError for a name that
    the network does not have, listing those it has, and where the remaining layers do not fit together.
    """
    if kind := stock_name(teacher.network):
        if isinstance(blocks, str):
            raise UserError(
                f"student.blocks {blocks} is of UNets, and this teacher is {a_or_an(kind)}; use keep, a "
                "share of its blocks, or a list of them"
            )
        return with_network(teacher, without(teacher.network, blocks))
    network = unet_of(teacher)
    patterns = dropped_by(blocks, network) if isinstance(blocks, str) else list(blocks)
    return with_network(teacher, drop_layers(network, patterns))


def keep_spread(teacher: Denoiser, share: float) -> Denoiser:
    """The teacher, a transformer, with this share of its blocks, spread evenly (see `transformers.spread`).

    Raises UserError for another network.
    """
    if not stock_name(teacher.network):
        unet_of(teacher)
        raise UserError(
            "student.keep is of the blocks of a transformer, and this teacher is a UNet; name what it is to "
            "lose in student.blocks"
        )
    return with_network(teacher, without(teacher.network, spread(teacher.network, share)))


def droppable(network: UNet) -> list[str]:
    """The names that can be dropped: layers, a block's attention, the middle, the innermost resolution.

    A resnet takes the attention beside it along. The innermost resolution is named by its down block. With
    its attention the middle of a UNet2DConditionModel loses the resnet after it: diffusers has no other.
    """
    names: list[str] = []
    for side in SIDES:
        for i, block in enumerate(getattr(network, side)):
            names += [f"{side}.{i}.resnets.{j}" for j in range(len(block.resnets))]
            if network.config[_types(side)][i] in WITHOUT_ATTENTION:
                names.append(f"{side}.{i}.attentions")
    if network.mid_block is not None:
        names += ["mid_block"] + ["mid_block.attentions"] * _middle_attends(network.config)
    if len(network.down_blocks) > 1:
        names.append(f"down_blocks.{len(network.down_blocks) - 1}")
    return names


def drop_layers(network: UNet, patterns: Sequence[str]) -> UNet:
    """A new network without these blocks; its config describes it, so it is saved and loaded as usual.

    patterns: names of `droppable`, in which * matches anything. As many resnets must go from the two blocks
    of a resolution, and of a UNet2DModel, whose config has one number of layers, from every block. Raises
    UserError for names that the network does not have, and where the remaining layers do not fit together.
    """
    names = _matching(network, patterns)
    config, blocks = config_of(network), len(network.down_blocks)
    innermost = f"down_blocks.{blocks - 1}" in names
    gone = {"down_blocks": blocks - 1, "up_blocks": 0} if innermost else {}
    kept = {
        side: [
            [j for j in range(len(block.resnets)) if f"{side}.{i}.resnets.{j}" not in names]
            for i, block in enumerate(getattr(network, side))
            if i != gone.get(side)
        ]
        for side in SIDES
    }
    for side in SIDES:
        config[_types(side)] = tuple(
            WITHOUT_ATTENTION[kind] if f"{side}.{i}.attentions" in names else kind
            for i, kind in enumerate(config[_types(side)])
        )
    if "mid_block" in names:
        config["mid_block_type"] = None
    elif "mid_block.attentions" in names:
        config |= _attention_free_middle(config)
    if innermost:
        config |= resolutions.without_innermost(config, middle_attends=_middle_attends(config))
    alike = isinstance(network, UNet2DModel)
    config |= resolutions.with_layers(config, kept, blocks, alike=alike)
    smaller = reinitialized_like(network, **config)
    _copy_weights(smaller, network, kept, shift=int(innermost))
    return smaller


def _types(side: str) -> str:
    return side.replace("blocks", "block_types")


def _middle_attends(config: Any) -> bool:
    """Whether the middle has attention that can be dropped."""
    kind = config["mid_block_type"]
    return kind in WITHOUT_ATTENTION or (kind is not None and bool(config.get("add_attention")))


def _attention_free_middle(config: Any) -> dict[str, Any]:
    if "add_attention" in config:
        return {"add_attention": False}
    return {"mid_block_type": WITHOUT_ATTENTION[config["mid_block_type"]]}


def _matching(network: UNet, patterns: Sequence[str]) -> set[str]:
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


def _copy_weights(smaller: UNet, network: UNet, kept: Kept, shift: int) -> None:
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


def _name_in_teacher(name: str, kept: Kept, shift: int) -> str:
    """The teacher's name for a parameter of the student."""
    parts = name.split(".")
    if parts[0] in SIDES and parts[2] in ("resnets", "attentions"):
        parts[3] = str(kept[parts[0]][int(parts[1])][int(parts[3])])
    if parts[0] == "up_blocks":
        parts[1] = str(int(parts[1]) + shift)
    return ".".join(parts)


def _layer(name: str) -> str:
    return ".".join(name.split(".")[:4])


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else "x".join(map(str, tensor.shape))
