"""KID, the kernel distance between two sets of features."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from diffkd.errors import UserError
from diffkd.metrics.base import Inputs, Metric, Value
from diffkd.metrics.distances import pair


class KernelDistance(NamedTuple):
    """mean, std: over the subsets; std is that of one subset, not of the mean.

    std is None where subsets say nothing of the spread: there is one, or each is the whole of a set.
    """

    mean: float
    std: float | None


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
    spread = subsets > 1 and size < min(len(x), len(y))
    return KernelDistance(float(distances.mean()), float(distances.std(unbiased=False)) if spread else None)


def _off_diagonal(kernel: Tensor) -> Tensor:
    return kernel.sum() - kernel.diagonal().sum()


class Kid(Metric):
    """Unbiased kernel distance, mean and spread over subsets; no spread where a subset is a whole set."""

    name: ClassVar[str] = "kid"
    values: ClassVar[tuple[Value, ...]] = (Value("kid", "KID", ".5f", ("kid_std",)),)
    stores_reference: ClassVar[bool] = True
    stores_images: ClassVar[bool] = True

    kid_subsets: int = Field(100, ge=1, le=100_000, description="subsets that KID is the mean over")
    kid_subset_size: int = Field(
        1000, ge=2, description="images in each subset; below both sets for a spread"
    )

    def options(self, samples: int, reference: int | None) -> dict[str, Any]:
        size = min(self.kid_subset_size, samples, reference or samples)
        return {"subsets": self.kid_subsets, "subset_size": size, "degree": 3, "seed": 0}

    def compute(self, inputs: Inputs) -> dict[str, float | None]:
        found = kernel_distance(inputs.images.features, inputs.reference.features, **inputs.options)
        values: dict[str, float | None] = {"kid": found.mean}
        return values if found.std is None else values | {"kid_std": found.std}
