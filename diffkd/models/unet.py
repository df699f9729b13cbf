"""UNets: with a fast dtype while diffkd runs them; UNet2DModels built from a config, reinitialized."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Annotated, Any, TypeAlias, TypeVar

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from pydantic import Field
from torch import nn

from diffkd.errors import UserError
from diffkd.io.config import Strict

AnyUNet = TypeVar("AnyUNet", UNet2DModel, UNet2DConditionModel)
UNet: TypeAlias = UNet2DModel | UNet2DConditionModel


class _FastDtype:
    """The stock classes walk through all of their modules for their dtype, twice in every forward pass: a
    fifth of the digits network's time at batch 1 (docs/performance.md). This reads it off one weight."""

    conv_in: nn.Conv2d

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype


class FastUNet2DModel(_FastDtype, UNet2DModel):
    pass


class FastUNet2DConditionModel(_FastDtype, UNet2DConditionModel):
    pass


FAST = {UNet2DModel: FastUNet2DModel, UNet2DConditionModel: FastUNet2DConditionModel}


def to_fast(network: AnyUNet) -> AnyUNet:
    """The same network, its class replaced in place."""
    network.__class__ = FAST.get(type(network), type(network))
    return network


def to_stock(network: AnyUNet) -> AnyUNet:
    """A shallow copy of the stock class, which diffusers can save by its name; weights are shared."""
    shared: AnyUNet = copy.copy(network)
    shared.__class__ = next((stock for stock, fast in FAST.items() if type(network) is fast), type(network))
    return shared


def config_of(network: UNet) -> dict[str, Any]:
    """The arguments that make a network of the same architecture."""
    return {key: value for key, value in network.config.items() if not key.startswith("_")}


def reinitialized_like(network: UNet, **changes: Any) -> UNet:
    """A freshly initialised network of the same class and config but for `changes`, on the same device, in
    the same dtype and mode. torch's global generators are left as they were."""
    kind = next(stock for stock in FAST if isinstance(network, stock))
    parameter = next(network.parameters())
    with torch.random.fork_rng(), torch.device("meta") if parameter.is_meta else nullcontext():
        made: UNet = to_fast(kind.from_config({**config_of(network), **changes}))
    torch.nn.Module.to(made, parameter.device, parameter.dtype)  # diffusers' own override would warn
    return made.train(network.training)


class UNet2D(Strict):
    """The config of a new UNet2DModel."""

    channels: list[Annotated[int, Field(ge=1, le=1 << 14)]] = Field(
        [32, 64],
        min_length=1,
        description="channels at each resolution, each half the size of the one before",
    )
    layers: int = Field(1, ge=1, le=100, description="residual blocks at each resolution")
    attention: list[bool] | None = Field(None, description="self-attention at each resolution; default none")
    mid_attention: bool = Field(True, description="self-attention in the innermost block")
    attention_head_dim: int = Field(8, ge=1, description="channels of an attention head")
    norm_groups: int = Field(
        8, ge=1, description="groups of group normalisation; divides every channel count"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="in the residual blocks, while training")

    def build(self, shape: tuple[int, int, int], num_classes: int | None) -> UNet2DModel:
        """A freshly initialised network. shape: (C, H, W) of an image. num_classes: with the null label."""
        channels, height, width = shape
        factor = 2 ** (len(self.channels) - 1)
        if height % factor or width % factor:
            raise UserError(
                f"images of {height}x{width} cannot be halved {len(self.channels) - 1} times; "
                f"use sizes that {factor} divides, or fewer model.channels"
            )
        for count in self.channels:
            if count % self.norm_groups:
                raise UserError(
                    f"model.norm_groups {self.norm_groups} does not divide {count} channels; "
                    "choose one that divides each of model.channels"
                )
        attention = self.attention or [False] * len(self.channels)
        if len(attention) != len(self.channels):
            raise UserError(
                f"model.attention has {len(attention)} entries for {len(self.channels)} resolutions; "
                "give one for each of model.channels"
            )
        attended = [count for count, has in zip(self.channels, attention, strict=True) if has]
        if self.mid_attention:
            attended.append(self.channels[-1])
        for count in attended:
            if count < self.attention_head_dim:
                raise UserError(
                    f"model.attention_head_dim {self.attention_head_dim} is more than the {count} channels "
                    "where attention is; use fewer, or no attention there"
                )
        return to_fast(
            UNet2DModel(
                sample_size=height if height == width else (height, width),
                in_channels=channels,
                out_channels=channels,
                block_out_channels=tuple(self.channels),
                layers_per_block=self.layers,
                down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
                up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
                add_attention=self.mid_attention,
                attention_head_dim=self.attention_head_dim,
                norm_num_groups=self.norm_groups,
                dropout=self.dropout,
                num_class_embeds=num_classes,
            )
        )
