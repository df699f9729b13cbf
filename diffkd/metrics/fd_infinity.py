"""FD-infinity: the Fréchet distance extrapolated to infinitely many samples."""

from __future__ import annotations

from statistics import linear_regression
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from diffkd.errors import UserError
from diffkd.metrics.base import Inputs, Metric, Value
from diffkd.metrics.frechet import Gaussian
from diffkd.metrics.sampling_error import Subsets


class Infinity(NamedTuple):
    """value: the distance extrapolated to infinitely many samples. slope: of the distance in 1 / N."""

    value: float
    slope: float


def frechet_infinity(
    features: Tensor, reference: Gaussian, *, points: int = 15, smallest: float = 0.1, seed: int = 0
) -> Infinity:
    """FD-infinity (Chong & Forsyth 2020): a line through the distance in 1 / N, at 1 / N = 0.

    features: (N, d). Random subsets of `points` sizes, evenly spaced between `smallest` N and N.
    """
    total = len(features)
    sizes = torch.linspace(max(smallest * total, 2), total, points).round().long().tolist()
    _check_count(total, points)
    rng = torch.Generator().manual_seed(seed)
    subsets, values = Subsets(features, reference), []
    for size in sizes:
        chosen = torch.randperm(total, generator=rng)[:size]
        values.append(subsets.distance(chosen))
    line = linear_regression([1 / size for size in sizes], values)
    return Infinity(line.intercept, line.slope)


def _check_count(total: int, points: int) -> None:
    if total < 2 * points:
        raise UserError(f"fd_inf draws a line through {points} sample counts, too many for {total} images")


class FdInfinity(Metric):
    """FID extrapolated to infinitely many samples."""

    name: ClassVar[str] = "fd_inf"
    values: ClassVar[tuple[Value, ...]] = (Value("fd_inf", "FD-infinity", ".3f"),)
    more: ClassVar[tuple[str, ...]] = ("fd_inf_slope",)
    stores_images: ClassVar[bool] = True

    def options(self, samples: int, reference: int | None) -> dict[str, Any]:
        _check_count(samples, 15)
        return {"points": 15, "smallest": 0.1, "seed": 0}

    def compute(self, inputs: Inputs) -> dict[str, float | None]:
        line = frechet_infinity(inputs.images.features, inputs.reference.gaussian, **inputs.options)
        return {"fd_inf": line.value, "fd_inf_slope": line.slope}
