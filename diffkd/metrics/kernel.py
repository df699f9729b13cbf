"""Distances between sets of features by a kernel: KID and CMMD. They need every feature, and no Gaussian."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffkd.errors import UserError

BLOCK = 1 << 24  # entries of a block of a kernel matrix: 128 MB


class KernelDistance(NamedTuple):
    """mean, std: over the subsets; std is that of one subset, not of the mean."""

    mean: float
    std: float


def kernel_distance(
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    degree: int = 3,
    gamma: float | None = None,
    coef: float = 1.0,
    seed: int = 0,
) -> KernelDistance:
    """KID: the unbiased squared MMD of a polynomial kernel (Bińkowski et al. 2018, section 4).

    The kernel is (gamma x·y + coef)^degree. x: (N, d), y: (M, d). gamma: default 1 / d. Each subset is drawn
    without replacement from either set; subset_size is at most the smaller set. Raises UserError for fewer
    than 2 samples.
    """
    x, y = pair(x, y, 2)
    size = min(subset_size, len(x), len(y))
    if subsets < 1 or subset_size < 2:
        raise UserError(f"{subsets} subsets of {subset_size} give no KID; use at least 1 of at least 2")
    rng = torch.Generator().manual_seed(seed)

    def subset(of: Tensor) -> Tensor:
        return of[torch.randperm(len(of), generator=rng)[:size].to(of.device)].double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return ((a @ b.T) * (1 / a.shape[1] if gamma is None else gamma) + coef) ** degree

    values = []
    for _ in range(subsets):
        a, b = subset(x), subset(y)
        within = (_off_diagonal(kernel(a, a)) + _off_diagonal(kernel(b, b))) / (size * (size - 1))
        values.append(within - 2 * kernel(a, b).mean())
    distances = torch.stack(values)
    return KernelDistance(float(distances.mean()), float(distances.std(unbiased=False)))


def cmmd(
    x: Tensor | np.ndarray, y: Tensor | np.ndarray, *, bandwidth: float = 10.0, scale: float = 1000.0
) -> float:
    """CMMD: scale times the squared MMD of a Gaussian kernel (Jayasumana et al. 2024, section 4).

    The kernel is exp(-|x - y|² / (2 bandwidth²)). x: (N, d), y: (M, d), CLIP embeddings of unit length. The
    biased estimate, as published: a pair of a sample with itself counts.
    """
    x, y = pair(x, y, 1)

    def mean(a: Tensor, b: Tensor) -> Tensor:
        a, b = a.double(), b.double()
        total = a.new_zeros(())
        for rows in a.split(max(BLOCK // len(b), 1)):
            total += torch.exp(-squared_distances(rows, b) / (2 * bandwidth**2)).sum()
        return total / (len(a) * len(b))

    return scale * float(mean(x, x) + mean(y, y) - 2 * mean(x, y))


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|² of float64 rows, (N, d) and (M, d) -> (N, M)."""
    products = torch.addmm(b.square().sum(1), a, b.T, alpha=-2)
    return products.add_(a.square().sum(1)[:, None]).clamp_(min=0)


def _off_diagonal(kernel: Tensor) -> Tensor:
    return kernel.sum() - kernel.diagonal().sum()


def pair(x: Any, y: Any, least: int) -> tuple[Tensor, Tensor]:
    """Two sets of features (N, d) and (M, d) as tensors. UserError where they are no such, or too few."""
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise UserError(
            f"features of shapes {tuple(x.shape)} and {tuple(y.shape)} cannot be compared; "
            "use one feature network for both"
        )
    if min(len(x), len(y)) < least:
        raise UserError(f"this needs at least {least} images of each; there are {len(x)} and {len(y)}")
    return x, y
