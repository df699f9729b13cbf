"""A small convolutional classifier of images of any size, clean or noised."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from diffkd.io.config import Strict

FREQUENCIES = 16  # of the time embedding, a sine and a cosine each
LONGEST = 10_000.0  # the longest of their periods over 2 pi, in steps of the schedule's table
Width = Annotated[int, Field(ge=1, le=1 << 14)]


class CNN(nn.Module):
    """Two 3x3 convolutions at each resolution, averages of 2x2 in between; logits of the mean over pixels.

    (B, C, H, W) -> (B, K), or timed, (B, C, H, W), (B,) -> (B, K) with time as a schedule's table index.
    Group rather than batch normalisation: without running statistics, the moving average of the weights,
    which is what is kept, is the whole network.
    """

    def __init__(self, in_channels: int, num_classes: int, channels: list[int], *, timed: bool) -> None:
        super().__init__()
        widths = [width for width in channels for _ in range(2)]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, width, 3, padding=1)
            for before, width in zip([in_channels, *widths], widths, strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(groups(width), width) for width in widths)
        self.times = nn.ModuleList(nn.Linear(2 * FREQUENCIES, 2 * width) for width in widths if timed)
        self.classify = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        assert (time is not None) == bool(self.times)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if i and i % 2 == 0 and min(x.shape[2:]) > 1:
                x = F.avg_pool2d(x, 2)
            x = norm(conv(x))
            if time is not None:
                scale, shift = self.times[i](time_embedding(time).to(x.dtype))[:, :, None, None].chunk(2, 1)
                x = x * (1 + scale) + shift
            x = F.silu(x)
        logits: Tensor = self.classify(x.mean((2, 3)))
        return logits


class Arguments(Strict):
    """The arguments of a CNN in a config."""

    channels: list[Width] = Field(
        min_length=1, max_length=12, description="channels of each resolution, halved in between"
    )

    def build(self, in_channels: int, num_classes: int, *, timed: bool) -> CNN:
        return CNN(in_channels, num_classes, self.channels, timed=timed)


def groups(width: int) -> int:
    """Of eight channels or more: of fewer, over few pixels, the mean is most of the information."""
    return math.gcd(width, max(1, width // 8))


def time_embedding(time: Tensor) -> Tensor:
    """Sines and cosines with periods from 2 pi to 2 pi LONGEST: (B,) -> (B, 2 FREQUENCIES) float32."""
    powers = torch.arange(FREQUENCIES, device=time.device) / (FREQUENCIES - 1)
    angles = time[:, None].float() * torch.exp(-math.log(LONGEST) * powers)
    return torch.cat([angles.sin(), angles.cos()], 1)
