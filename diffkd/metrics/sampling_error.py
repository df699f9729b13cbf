"""What a finite sample does to the Fréchet distance: its bias and its spread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffkd.errors import UserError
from diffkd.metrics.frechet import Gaussian, distance
from diffkd.metrics.statistics import Statistics

EXPANDED = 4  # samples per feature beyond which the second-order formula holds to a few percent


def floor(sigma: Tensor, num_samples: int, num_reference: int | None = None) -> float:
    """The distance to expect between samples of one and the same distribution, of covariance sigma (d, d).

    num_reference: samples that the reference was computed from; None for a reference without error.
    With many samples, by the expansion of the distance to second order in the errors of mean and covariance:
    (1/N1 + 1/N2) (tr + ½ sum_ij l_i l_j / (l_i + l_j) + ¼ tr) for eigenvalues l, which for the identity is
    (1/N1 + 1/N2) (d + d (d + 1) / 4). With few, by drawing Gaussian samples of this spectrum.
    """
    if min(num_samples, num_reference or 2) < 2:
        raise UserError(f"a covariance needs at least 2 samples, and {num_samples} were given")
    spectrum = torch.linalg.eigvalsh(sigma.double()).clamp(min=0)
    spectrum = spectrum[spectrum > spectrum.max() * len(spectrum) * torch.finfo(torch.float64).eps]
    counts = [num_samples] + ([] if num_reference is None else [num_reference])
    if min(counts) >= EXPANDED * len(spectrum):
        products = spectrum[:, None] * spectrum / (spectrum[:, None] + spectrum)
        return sum(1 / n for n in counts) * float(1.25 * spectrum.sum() + products.sum() / 2)
    return _simulated(spectrum, counts)


def _simulated(spectrum: Tensor, counts: list[int]) -> float:
    rng = torch.Generator(spectrum.device).manual_seed(0)
    exact = Gaussian(torch.zeros_like(spectrum), spectrum.sqrt().diag(), spectrum.sum())
    draws = max(8, 4096 // len(spectrum))

    def drawn(count: int) -> Gaussian:
        x = torch.randn(count, len(spectrum), dtype=torch.float64, device=spectrum.device, generator=rng)
        mu = (x * spectrum.sqrt()).mean(0)
        factor = ((x * spectrum.sqrt() - mu) / (count - 1) ** 0.5).T
        if count > len(spectrum):  # the same covariance from a smaller factor
            factor = torch.linalg.qr(factor.T, mode="r").R.T
        return Gaussian(exact.mu, factor, factor.square().sum())

    values = [
        distance(drawn(counts[0]), drawn(counts[1]) if len(counts) > 1 else exact) for _ in range(draws)
    ]
    return sum(values) / draws + sum(1 / n for n in counts) * float(spectrum.sum())  # the means' part


class Interval(NamedTuple):
    """low, high: bounds. std: standard deviation of the distance over samples of this size."""

    low: float
    high: float
    std: float


def bootstrap(
    features: Tensor,
    reference: Gaussian,
    *,
    draws: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """An interval for the distance at this number of samples, by resampling the features (N, d).

    A resample holds fewer distinct samples, so its distance is larger: the deviations from the resamples'
    mean are put around the distance of the sample itself.
    """
    value = distance(gaussian_of(features), reference)
    rng = torch.Generator().manual_seed(seed)
    resampled = []
    for _ in range(draws):
        chosen = torch.randint(len(features), (len(features),), generator=rng)
        resampled.append(distance(gaussian_of(features[chosen.to(features.device)]), reference))
    values = torch.tensor(resampled, dtype=torch.float64)
    deviations = values - values.mean()
    tail = (1 - level) / 2
    low, high = torch.quantile(deviations, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(max(value + low, 0.0), value + high, float(values.std()))


def gaussian_of(features: Tensor) -> Gaussian:
    """The Gaussian of features (N, d), which are summed in parts."""
    statistics = Statistics()
    for batch in _batches(features):
        statistics.update(batch)
    return statistics.gaussian()


def _batches(features: Tensor, size: int = 8192) -> Iterator[Tensor]:
    yield from features.split(size)
