"""Four ways from images of any size to the square that a feature network takes; FIDs must not mix them."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkd.errors import UserError

Resize = Literal["tf1", "bilinear", "antialias", "clean"]
RESIZES: tuple[str, ...] = get_args(Resize)


def check(how: str) -> None:
    """Raises UserError unless `how` is one of RESIZES."""
    if how not in RESIZES:
        raise UserError(f"resize {how!r} is unknown; use one of {', '.join(RESIZES)}")


def resize(images: Tensor, size: int, how: str, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, C, H, W), uint8 or float in 0..255 -> (B, C, size, size) of `dtype` in 0..255, on the same device.

    tf1: TensorFlow 1's resize_bilinear without half-pixel centres, as the first FID code resizes.
    bilinear: half-pixel centres, no filter when shrinking, as pytorch-fid.
    antialias: the same with the filter, as torchmetrics since 1.8.
    clean: Pillow's bicubic in float, clipped, as clean-fid (Parmar et al. 2022).
    """
    check(how)
    x = images.to(dtype)
    if how == "tf1":
        return _tf1(_tf1(x, size, dim=3), size, dim=2)  # columns first: float sums depend on the order
    square = (size, size)
    if how == "clean":  # torch's antialiased bicubic is Pillow's filter (a = -0.5); the plain one has -0.75
        return F.interpolate(x, square, mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
    return F.interpolate(x, square, mode="bilinear", align_corners=False, antialias=how == "antialias")


def _tf1(x: Tensor, size: int, dim: int) -> Tensor:
    """Output i of an axis lies at i * length / size: no half-pixel shift, the last pixel repeated."""
    length = x.shape[dim]
    i = torch.arange(size, device=x.device) * length
    low = i // size
    weight = (i % size).double().div(size).to(x.dtype).view(-1, *[1] * (3 - dim))
    start = x.index_select(dim, low)
    end = x.index_select(dim, (low + 1).clamp(max=length - 1))
    return end.sub_(start).mul_(weight).add_(start)
