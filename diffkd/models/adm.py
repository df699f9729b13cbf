"""ADM as NVlabs' EDM has it (`DhariwalUNet`), read as the stock UNet2DModel of the same operations.

Dhariwal & Nichol 2021; Karras et al. 2022 train it on ImageNet at 64x64. No arithmetic differs: layers have
other names, and query, key and value of each attention are one layer there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from diffkd.errors import UserError
from diffkd.io.text import quoted

HEAD = 64  # channels of an attention head
GROUPS, LEAST = 32, 128  # of every normalisation; there, those of fewer channels have fewer groups
LAYERS = {  # of a residual block: what they are called there, and here
    "norm0": "norm1", "conv0": "conv1", "affine": "time_emb_proj", "norm1": "norm2", "conv1": "conv2",
    "skip": "conv_shortcut",
}  # fmt: skip
OTHERS = {
    "map_layer0": "time_embedding.linear_1", "map_layer1": "time_embedding.linear_2",
    "out_norm": "conv_norm_out", "out_conv": "conv_out",
}  # fmt: skip


def network_of(given: Mapping[str, Any], weights: Mapping[str, Tensor]) -> UNet2DModel:
    """The UNet2DModel of a DhariwalUNet. given: its arguments. weights: by their names there.

    Raises UserError for arguments that no UNet2DModel stands for, and RuntimeError for weights that are not
    those of the arguments.
    """
    with torch.device("meta"):  # its weights take no memory before they are known to be these
        network = UNet2DModel(**config_of(given))
    sides = [given["img_resolution"] >> level for level in range(len(network.down_blocks))]
    network.load_state_dict(renamed(weights, sides, network.config.layers_per_block), assign=True)
    return network.requires_grad_(True)


def config_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the UNet2DModel. Raises UserError as `network_of`."""
    side, width = given["img_resolution"], given.get("model_channels", 192)
    mults, attention = [*given.get("channel_mult", (1, 2, 3, 4))], given.get("attn_resolutions", (32, 16, 8))
    embedded = given.get("channel_mult_emb", 4)
    if mults[0] != 1:
        raise UserError(
            f"channel_mult {quoted(mults)}: a UNet2DModel embeds the time in as many numbers as its first "
            "block has channels, so it stands for those that begin with 1"
        )
    widths = [width * mult for mult in mults]
    attends = [side >> level in attention for level in range(len(mults))]
    for own, has in zip(widths, [*attends[:-1], True], strict=True):
        if own < LEAST or own % GROUPS:
            raise UserError(
                f"{own} channels (model_channels by channel_mult): a UNet2DModel has {GROUPS} groups in "
                f"every normalisation, so it stands for multiples of {GROUPS} from {LEAST}"
            )
        if has and own % HEAD:
            raise UserError(
                f"attention of {own} channels: a UNet2DModel has heads of {HEAD}, so it stands for multiples"
            )
    return {
        "sample_size": side,
        "in_channels": given["in_channels"],
        "out_channels": given["out_channels"],
        "block_out_channels": tuple(widths),
        "layers_per_block": given.get("num_blocks", 3),
        "down_block_types": tuple("AttnDownBlock2D" if has else "ResnetDownsampleBlock2D" for has in attends),
        "up_block_types": tuple(
            "AttnUpBlock2D" if has else "ResnetUpsampleBlock2D" for has in reversed(attends)
        ),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "time_embedding_dim": None if embedded == 4 else width * embedded,  # four times, where it is not said
        "attention_head_dim": HEAD,
        "norm_num_groups": GROUPS,
        "attn_norm_num_groups": GROUPS,  # else the attention in the middle would have no normalisation
        "dropout": given.get("dropout", 0.10),
        "num_class_embeds": given.get("label_dim") or None,
    }


def renamed(weights: Mapping[str, Tensor], sides: list[int], layers: int) -> dict[str, Tensor]:
    """The weights by their names here; one that has none keeps its own. sides: of the resolutions.

    An augmentation that the network was told of in training (map_augment) is left out: nothing is told here.
    """
    blocks = dict(_blocks(sides, layers))
    names = {**OTHERS, f"enc.{sides[0]}x{sides[0]}_conv": "conv_in"}
    made = {}
    for key, value in weights.items():
        layer, _, kind = key.rpartition(".")
        block, _, part = layer.rpartition(".")
        attention = blocks.get(block, "").replace("resnets", "attentions")
        if key == "map_label.weight":  # of labels as vectors of 0 and 1
            made["class_embedding.weight"] = value.T.contiguous()
        elif layer == "map_augment":
            continue
        elif block in blocks and part in LAYERS:
            made[f"{blocks[block]}.{LAYERS[part]}.{kind}"] = value
        elif block in blocks and part == "norm2":
            made[f"{attention}.group_norm.{kind}"] = value
        elif block in blocks and part == "qkv":
            for name, one in zip("qkv", _split(value), strict=True):
                made[f"{attention}.to_{name}.{kind}"] = one
        elif block in blocks and part == "proj":
            made[f"{attention}.to_out.0.{kind}"] = value.flatten(1) if kind == "weight" else value
        else:
            made[f"{names.get(layer, layer)}.{kind}"] = value
    return made


def _split(value: Tensor) -> Iterator[Tensor]:
    """Query, key and value, which lie beside each other by head and channel: (3 C, ...) -> (C, ...)."""
    one = value.reshape(-1, HEAD, 3, *value.shape[1:2])
    return (part.flatten(0, 1).contiguous() for part in one.unbind(2))


def _blocks(sides: list[int], layers: int) -> Iterator[tuple[str, str]]:
    """What each residual block is called there, and here. One that halves or doubles begins a resolution
    there, and ends the one before it here."""
    for level, side in enumerate(sides):
        if level:
            yield f"enc.{side}x{side}_down", f"down_blocks.{level - 1}.downsamplers.0"
        for i in range(layers):
            yield f"enc.{side}x{side}_block{i}", f"down_blocks.{level}.resnets.{i}"
    for i in range(2):
        yield f"dec.{sides[-1]}x{sides[-1]}_in{i}", f"mid_block.resnets.{i}"
    for level, side in enumerate(reversed(sides)):
        if level:
            yield f"dec.{side}x{side}_up", f"up_blocks.{level - 1}.upsamplers.0"
        for i in range(layers + 1):
            yield f"dec.{side}x{side}_block{i}", f"up_blocks.{level}.resnets.{i}"
