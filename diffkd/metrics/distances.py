"""Pairs of feature sets, and the distances between their rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkd.errors import UserError

BLOCK = 1 << 24  # entries of a block of a matrix of all pairs: 128 MB


def pair(x: Any, y: Any, least: int) -> tuple[Tensor, Tensor]:
    """Two sets of features (N, d) and (M, d) as tensors. Raises UserError for other shapes and too few."""
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise UserError(
            f"features of shapes {tuple(x.shape)} and {tuple(y.shape)} cannot be compared; "
            "use one feature network for both"
        )
    if min(len(x), len(y)) < least:
        raise UserError(f"this needs at least {least} images of each; there are {len(x)} and {len(y)}")
    return x, y


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|² of float64 rows, (N, d) and (M, d) -> (N, M)."""
    products = torch.addmm(b.square().sum(1), a, b.T, alpha=-2)
    return products.add_(a.square().sum(1)[:, None]).clamp_(min=0)
