"""How much of each set of features lies near the other, by balls around nearest neighbours.

Distances are computed block by block: no matrix of all pairs is held.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from diffkd.errors import UserError
from diffkd.metrics.base import Inputs, Metric, Value
from diffkd.metrics.distances import BLOCK, pair, squared_distances


class PrecisionRecall(NamedTuple):
    """precision: share of fakes near a real. recall: share of reals near a fake."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """density: mean number of real balls around a fake, over k. coverage: share of real balls with a fake."""

    density: float
    coverage: float


def precision_recall(real: Tensor | np.ndarray, fake: Tensor | np.ndarray, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    real: (N, d), fake: (M, d). The ball around a sample reaches to its k-th nearest neighbour in its own set
    and leaves that one out, as in the code of Naeem et al.: exact copies alone show the difference.
    """
    real, fake = _prepared(real, fake, k)
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)
    inside_real = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    recalled = 0
    for start, block in _blocks(real, fake):
        inside_real |= (block < real_radii[start : start + len(block), None]).any(0)
        recalled += int((block < fake_radii).any(1).sum())
    return PrecisionRecall(float(inside_real.double().mean()), recalled / len(real))


def density_coverage(real: Tensor | np.ndarray, fake: Tensor | np.ndarray, k: int = 5) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020). real: (N, d), fake: (M, d)."""
    real, fake = _prepared(real, fake, k)
    radii = _radii(real, k)
    balls = covered = 0
    for start, block in _blocks(real, fake):
        inside = block < radii[start : start + len(block), None]
        balls += int(inside.sum())
        covered += int(inside.any(1).sum())
    return DensityCoverage(balls / (k * len(fake)), covered / len(real))


def _prepared(real: Any, fake: Any, k: int) -> tuple[Tensor, Tensor]:
    real, fake = pair(real, fake, 0)
    _check_counts(len(real), len(fake), k)
    real, fake = real.double(), fake.double()
    centre = real.mean(0)  # distances are differences: small numbers keep their digits
    return real - centre, fake - centre


def _check_counts(real: int, fake: int, k: int) -> None:
    if min(real, fake) <= k:
        raise UserError(
            f"the {k}-th nearest neighbour needs more than {k} images of each; there are {real} and {fake}"
        )


def _radii(x: Tensor, k: int) -> Tensor:
    """Squared distance of each sample from its k-th nearest neighbour, (N,)."""
    radii = []
    for start, block in _blocks(x, x):
        block.diagonal(start).fill_(torch.inf)
        radii.append(block.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _blocks(a: Tensor, b: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(index of its first row, block) of the squared distances of all a from all b."""
    rows = max(BLOCK // len(b), 1)
    for start in range(0, len(a), rows):
        yield start, squared_distances(a[start : start + rows], b)


class Prdc(Metric):
    """Precision and recall, density and coverage."""

    name: ClassVar[str] = "prdc"
    values: ClassVar[tuple[Value, ...]] = (
        Value("precision", "precision", ".3f"), Value("recall", "recall", ".3f"),
        Value("density", "density", ".3f"), Value("coverage", "coverage", ".3f"),
    )  # fmt: skip
    stores_reference: ClassVar[bool] = True
    stores_images: ClassVar[bool] = True

    precision_k: int = Field(3, ge=1, description="nearest neighbour that precision and recall reach to")
    density_k: int = Field(5, ge=1, description="nearest neighbour that density and coverage reach to")

    def options(self, samples: int, reference: int | None) -> dict[str, Any]:
        for k in (self.precision_k, self.density_k):
            _check_counts(samples if reference is None else reference, samples, k)
        return {"precision_k": self.precision_k, "density_k": self.density_k}

    def compute(self, inputs: Inputs) -> dict[str, float | None]:
        real, fake = inputs.reference.features, inputs.images.features
        near, dense = (
            precision_recall(real, fake, self.precision_k),
            density_coverage(real, fake, self.density_k),
        )
        return {**near._asdict(), **dense._asdict()}
