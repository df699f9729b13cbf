"""Latents as the tokens of transformers that take patches of 2x2 of them, and back."""

from __future__ import annotations

import torch
from torch import Tensor

PATCH = 2  # latents a side


def pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H/2 W/2, 4C): row by row, of a patch the channels first."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH**2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`: (B, H/2 W/2, 4C) -> (B, C, H, W)."""
    batch, _, channels = tokens.shape
    patches = tokens.reshape(batch, height // PATCH, width // PATCH, channels // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // PATCH**2, height, width)


def places(height: int, width: int, like: Tensor) -> Tensor:
    """(0, row, column) of every token of latents of this size: (H/2 W/2, 3), on the device of `like`."""
    rows, columns = (torch.arange(side // PATCH, device=like.device) for side in (height, width))
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], -1).reshape(-1, 3).float()
