"""What a finite sample does to the Fréchet distance: its bias and its spread."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diffkd.errors import UserError
from diffkd.metrics import spectrum
from diffkd.metrics.frechet import Gaussian, distance
from diffkd.metrics.statistics import Statistics

LEAST_DRAWS = 2  # resamples that have a spread
NEGLIGIBLE = 1e-6  # of the trace: what a covariance of few samples may have beyond their rank


def floor(sigma: Tensor, num_samples: int, num_reference: int | None = None) -> float:
    """The distance to expect of fresh samples from a reference of the same distribution.

    sigma: (d, d), the covariance of the reference's num_reference samples, or of the distribution itself
    where that is None: of a reference that was computed from unknown samples this is a lower bound. Any
    matrix with the same eigenvalues above 0 does as well. The distribution's spectrum is found from the
    sample's, and the distance is that of Gaussian samples,

        tr (2 + 1/N1 + 1/N2) - 2 E tr (S1 S2)^½ + tr (1/n1 + 1/n2) / 4

    with n = N - 1. The last term is what the expectation of `spectrum`, of many dimensions, leaves out. For
    many samples it is together (1/N1 + 1/N2) (5/4 tr + 1/2 sum_ij l_i l_j / (l_i + l_j)).
    """
    if min(num_samples, num_reference or 2) < 2:
        raise UserError(f"a covariance needs at least 2 samples, and {num_samples} were given")
    values = torch.linalg.eigvalsh(sigma.double()).clamp(min=0).flip(0)
    values = values[values > values[:1] * len(values) * torch.finfo(torch.float64).eps]
    freedom = (num_reference or 0) - 1
    if len(values) == 0:
        return 0.0
    if num_reference is not None and values[freedom:].sum() <= NEGLIGIBLE * values.sum():
        curve = spectrum.of_sample(values[:freedom].cpu().numpy(), freedom)
    else:  # of unknown samples, or of more than are named: a covariance that was smoothed
        curve = spectrum.of_population(values.cpu().numpy())
    counts = [float(num_samples), math.inf if num_reference is None else float(num_reference)]
    root = spectrum.expected_root(curve, *(n - 1 for n in counts))
    few = sum(1 / n + 0.25 / (n - 1) for n in counts)
    return curve.trace * (2 + few) - 2 * root


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
    mean are put around the distance of the sample itself. Raises UserError for fewer than 2 draws.
    """
    if draws < LEAST_DRAWS:
        raise UserError(f"{draws} resamplings have no spread; use at least {LEAST_DRAWS}, 200 is usual")
    subsets = Subsets(features, reference)
    count = len(features)
    value = subsets.distance(torch.arange(count))
    rng = torch.Generator().manual_seed(seed)
    resampled = [subsets.distance(torch.randint(count, (count,), generator=rng)) for _ in range(draws)]
    values = torch.tensor(resampled, dtype=torch.float64)
    deviations = values - values.mean()
    tail = (1 - level) / 2
    low, high = torch.quantile(deviations, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(max(value + low, 0.0), value + high, float(values.std()))


class Subsets:
    """Distances of many choices from the same features (N, d) to one reference.

    Of no more samples than features, what all choices share is computed once: the samples times the
    reference's factor, turned to a square matrix (N, N), of whose rows a choice takes the singular values.
    """

    def __init__(self, features: Tensor, reference: Gaussian) -> None:
        self.features, self.reference = features, reference
        self.few = 1 < len(features) <= features.shape[1]
        if self.few:
            x = features.double()
            self.mean = x.mean(0)
            self.x = x - self.mean
            self.seen = self.x @ reference.factor.to(x.device)
            if self.seen.shape[1] > len(x):
                self.seen = torch.linalg.qr(self.seen.T, mode="r").R.T

    def distance(self, chosen: Tensor) -> float:
        """chosen: (n,), indices, any of them as often as wanted. Raises UserError for fewer than 2."""
        chosen = chosen.to(self.features.device)
        if not self.few or len(chosen) < 2:
            return distance(gaussian_of(self.features[chosen]), self.reference)
        index, times = chosen.unique(return_counts=True)
        count, x, seen = len(chosen), self.x[index], self.seen[index]
        share = times.double() / count
        shift = share @ x
        weight = (share * count / (count - 1)).sqrt()[:, None]
        trace = ((x - shift) * weight).square().sum()
        cross = torch.linalg.svdvals((seen - share @ seen) * weight).sum()
        apart = (self.mean + shift - self.reference.mu.to(x.device)).square().sum()
        return max(float(apart + trace + self.reference.trace.to(x.device) - 2 * cross), 0.0)


def gaussian_of(features: Tensor) -> Gaussian:
    """The Gaussian of features (N, d); where N is at most d, its factor is the centred samples."""
    count, wide = features.shape
    if 1 < count <= wide:
        x = features.double()
        mu = x.mean(0)
        factor = ((x - mu) / (count - 1) ** 0.5).T
        return Gaussian(mu, factor, factor.square().sum())
    statistics = Statistics()
    for batch in features.split(8192):
        statistics.update(batch)
    return statistics.gaussian()
