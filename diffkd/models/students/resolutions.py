"""What the config of a UNet says of its resolutions, where layers or the innermost resolution are dropped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffkd.errors import UserError

SIDES = ("down_blocks", "up_blocks")
Kept = Mapping[str, list[list[int]]]  # of each side's blocks that stay: the numbers of the layers that stay

DOWNWARDS = (  # fields with an entry for each resolution, if not one for all; the first is the outermost
    "block_out_channels", "down_block_types", "layers_per_block", "transformer_layers_per_block",
    "attention_head_dim", "cross_attention_dim", "only_cross_attention",
)  # fmt: skip
UPWARDS = ("up_block_types", "reverse_transformer_layers_per_block")  # the first is the innermost
TRANSFORMERS = {  # fields whose entries may be lists with a number for each layer
    "down_blocks": "transformer_layers_per_block", "up_blocks": "reverse_transformer_layers_per_block",
}  # fmt: skip


def of_each(value: Any, resolutions: int) -> list[Any]:
    """A field's value for each resolution."""
    return list(value) if isinstance(value, list | tuple) else [value] * resolutions


def without_innermost(config: Mapping[str, Any], *, middle_attends: bool) -> dict[str, Any]:
    """The fields that change without the innermost resolution; the middle follows the one before.

    Raises UserError where these two differ in what the blocks around them go by.
    """
    last = len(config["block_out_channels"]) - 1
    widths = config["block_out_channels"]
    if widths[-1] != widths[-2]:
        raise UserError(
            f"down_blocks.{last} has {widths[-1]} channels and down_blocks.{last - 1} has {widths[-2]}: "
            "the remaining blocks would not fit together; drop layers of it instead"
        )
    for key in ("attention_head_dim", "transformer_layers_per_block") if middle_attends else ():
        inner, outer = of_each(config.get(key), last + 1)[-1:-3:-1]
        if inner != outer:
            raise UserError(
                f"down_blocks.{last} has {key} {inner} and down_blocks.{last - 1} has {outer}, which would "
                "become the middle's; drop mid_block too"
            )
    changes = {key: config[key][:-1] for key in DOWNWARDS if isinstance(config.get(key), list | tuple)}
    return changes | {key: config[key][1:] for key in UPWARDS if isinstance(config.get(key), list | tuple)}


def with_layers(config: Mapping[str, Any], kept: Kept, blocks: int, *, alike: bool) -> dict[str, Any]:
    """The fields that change where only some layers stay. config: of the resolutions that stay. blocks: how
    many there were, which messages count by. alike: whether all blocks must have the same number of layers.

    Raises UserError where the config cannot describe what stays.
    """
    _check_counts(config["layers_per_block"], kept, blocks, alike=alike)
    counts = [len(layers) for layers in kept["down_blocks"]]
    one = isinstance(config["layers_per_block"], int) and len({*counts}) == 1
    changes: dict[str, Any] = {"layers_per_block": counts[0] if one else counts}
    for side, key in TRANSFORMERS.items():
        if isinstance(config.get(key), list | tuple):
            each = zip(config[key], kept[side], strict=True)
            changes[key] = type(config[key])(
                [number[j] for j in layers] if isinstance(number, list | tuple) else number
                for number, layers in each
            )
    return changes


def _check_counts(given: Any, kept: Kept, blocks: int, *, alike: bool) -> None:
    """Raises UserError where more resnets go from one block than from another that has their number in
    common, or all of a block."""
    downs, ups = kept["down_blocks"], kept["up_blocks"][::-1]
    layers = of_each(given, len(downs))
    groups = [
        {
            f"down_blocks.{i}": layers[i] - len(downs[i]),
            f"up_blocks.{blocks - 1 - i}": layers[i] + 1 - len(ups[i]),
        }
        for i in range(len(downs))
    ]
    why = "the two blocks of a resolution have one number of layers"
    if alike:
        groups = [{name: count for group in groups for name, count in group.items()}]
        why = "a UNet2DModel has one number of layers for all"
    for group, has in zip(groups, layers, strict=False):
        most, least = max(group, key=group.__getitem__), min(group, key=group.__getitem__)
        if group[most] != group[least]:
            raise UserError(
                f"student.blocks drops {group[most]} resnets of {most} and {group[least]} of {least}; {why}, "
                "so drop as many from each block (* matches any)"
            )
        if group[most] >= has:
            raise UserError(
                f"student.blocks drops {group[most]} resnets of blocks that have {has}; at least one must "
                "stay in each"
            )
