"""From images of any size to the input of FID's Inception, as each tool does it; FIDs must not mix them."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkd.errors import UserError

Resize = Literal["tf1", "clean", "pytorch-fid", "torchmetrics", "bilinear", "antialias"]
OLD = {"bilinear": "bilinear", "antialias": "torchmetrics"}  # names of older versions: what they are now
RESIZES: tuple[str, ...] = tuple(name for name in get_args(Resize) if name not in OLD)


def renamed(description: Any) -> None:
    """Brings a description of features, of a record or file of statistics, to the names of today."""
    how = description.get("resize") if isinstance(description, dict) else None
    if isinstance(how, str) and description.get("name") == "inception":
        description["resize"] = OLD.get(how, how)


def check(how: str) -> None:
    """Raises UserError unless `how` is one of RESIZES, or of OLD."""
    if how not in RESIZES and how not in OLD:
        raise UserError(f"resize {how!r} is unknown; use one of {', '.join(RESIZES)}")


def prepare(images: Tensor, size: int, how: str, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, C, H, W) in 0..255 -> (B, C, size, size) as Inception takes it, normalised, on the same device.

    how: a whole protocol, by the name of the tool that has it. pytorch-fid feeds 2 v / 255 - 1, all others
    (v - 128) / 128, as the original.
    """
    x = resize(images, size, how, dtype=dtype)
    return x.div_(127.5).sub_(1) if how == "pytorch-fid" else x.sub_(128).div_(128)


def resize(images: Tensor, size: int, how: str, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, C, H, W), uint8 or float in 0..255 -> (B, C, size, size) of `dtype` in 0..255, on the same device.

    tf1: TensorFlow 1's resize_bilinear without half-pixel centres, as the first FID code and torch-fidelity.
    clean: Pillow's bicubic in float, clipped, as clean-fid (Parmar et al. 2022).
    pytorch-fid (and bilinear, of old): half-pixel centres, no filter when shrinking.
    torchmetrics (antialias, of old): the same with the filter, as torchmetrics since 1.8.
    """
    check(how)
    x = images.to(dtype)
    if how == "tf1":
        return _tf1(_tf1(x, size, dim=3), size, dim=2)  # columns first: float sums depend on the order
    square = (size, size)
    if how == "clean":  # torch's antialiased bicubic is Pillow's filter (a = -0.5); the plain one has -0.75
        return F.interpolate(x, square, mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
    filtered = how in ("torchmetrics", "antialias")
    return F.interpolate(x, square, mode="bilinear", align_corners=False, antialias=filtered)


def _tf1(x: Tensor, size: int, dim: int) -> Tensor:
    """Output i of an axis lies at i * length / size: no half-pixel shift, the last pixel repeated."""
    length = x.shape[dim]
    i = torch.arange(size, device=x.device) * length
    low = i // size
    weight = (i % size).double().div(size).to(x.dtype).view(-1, *[1] * (3 - dim))
    start = x.index_select(dim, low)
    end = x.index_select(dim, (low + 1).clamp(max=length - 1))
    return end.sub_(start).mul_(weight).add_(start)
