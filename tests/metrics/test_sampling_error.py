"""What a finite sample does, beside distances of many samples that NumPy draws."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from diffkd.errors import UserError
from diffkd.metrics.base import FeatureSet, Inputs
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.fd_infinity import Infinity, frechet_infinity
from diffkd.metrics.fid import Fid
from diffkd.metrics.frechet import Gaussian, gaussian
from diffkd.metrics.sampling_error import Subsets, bootstrap, floor
from diffkd.metrics.statistics import Statistics


def rng_of(*seed: int) -> np.random.Generator:
    return np.random.default_rng([28, *seed])


def root(x: np.ndarray) -> np.ndarray:
    """(R, N, d) -> (R, r, d): matrices A with AᵀA the covariance of each of R samples."""
    centred = (x - x.mean(1, keepdims=True)) / np.sqrt(x.shape[1] - 1)
    return np.linalg.qr(centred, mode="r")


def distances(
    x: np.ndarray, y: np.ndarray | None, sigma: np.ndarray, mu: np.ndarray | None = None
) -> np.ndarray:
    """(R,): of samples (R, N, d) from samples (R, M, d), or where y is None from the Gaussian itself."""
    one = root(x)
    values, vectors = np.linalg.eigh(sigma)
    exact = (np.sqrt(values.clip(0)) * vectors).T[None]
    two = exact if y is None else root(y)
    centre = (np.zeros(len(sigma)) if mu is None else mu)[None] if y is None else y.mean(1)
    cross = np.linalg.svd(one @ two.transpose(0, 2, 1), compute_uv=False).sum(-1)
    return ((x.mean(1) - centre) ** 2).sum(-1) + (one**2).sum((1, 2)) + (two**2).sum((1, 2)) - 2 * cross


def draws(rng: np.random.Generator, repeats: int, n: int, sigma: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(sigma)
    return rng.standard_normal((repeats, n, len(sigma))) @ (np.sqrt(values.clip(0)) * vectors).T


def covariance(rng: np.random.Generator, spectrum: np.ndarray) -> np.ndarray:
    q = np.linalg.qr(rng.standard_normal((len(spectrum), len(spectrum))))[0]
    sigma = q * spectrum @ q.T
    return (sigma + sigma.T) / 2


SPECTRA = ["flat", "random", "decaying", "half zero"]


def every(*values: object) -> list[Any]:
    """More of the same kind."""
    return [pytest.param(*value, marks=pytest.mark.exhaustive) for value in values]


def spectrum_of(name: str, d: int, rng: np.random.Generator) -> np.ndarray:
    return {
        "flat": np.ones(d),
        "random": rng.uniform(0.1, 3, d),
        "decaying": (1 + np.arange(d)) ** -1.5,
        "half zero": np.where(np.arange(d) < d // 2, rng.uniform(0.5, 2, d), 0),
    }[name]


def test_the_distances_of_this_file():
    """One of them by hand: variances 1 and 4, means 0 and 3."""
    x, y = np.array([[[-1.0], [0.0], [1.0]]]), np.array([[[1.0], [3.0], [5.0]]])
    assert distances(x, y, np.eye(1)) == pytest.approx([9 + 1 + 4 - 4])
    assert distances(x, None, np.array([[4.0]]), np.array([3.0])) == pytest.approx([9 + 1 + 4 - 4])


# the distance between samples of one distribution


@pytest.mark.parametrize("d", [1, 2, 16, 64])
@pytest.mark.parametrize(("n", "m"), [(5_000, 5_000), (10_000, 50_000), (1_000, None)])
def test_of_the_identity(d, n, m):
    """Of many samples it is (1/N1 + 1/N2) (d + d (d + 1) / 4), but for terms of the second order."""
    expected = (1 / n + (1 / m if m else 0)) * (d + d * (d + 1) / 4)
    assert floor(torch.eye(d), n, m) == pytest.approx(expected, rel=1.5 * d / n + 2 / n)


def test_of_any_covariance_by_the_formula_for_many_samples():
    rng = rng_of(1)
    l = spectrum_of("random", 12, rng)  # noqa: E741
    pairs = sum(a * b / (a + b) for a in l for b in l)
    expected = (1 / 90_000 + 1 / 70_000) * (l.sum() + pairs / 2 + l.sum() / 4)
    sigma = torch.from_numpy(covariance(rng, l))
    assert floor(sigma, 90_000, 70_000) == pytest.approx(expected, rel=1e-3)
    assert floor(9 * sigma, 90_000, 70_000) == pytest.approx(9 * floor(sigma, 90_000, 70_000), rel=1e-9)


def beside_draws(sigma: np.ndarray, n: int, m: int | None, repeats: int, slack: float, *seed: int) -> None:
    """floor() of references of m samples is in the mean that of distances of fresh samples from references,
    within 3 standard errors and `slack`, its own error, relative. It sees the references' covariances."""
    rng = rng_of(2, len(sigma), n, m or 0, *seed)
    reals = None if m is None else draws(rng, repeats, m, sigma)
    found = distances(draws(rng, repeats, n, sigma), reals, sigma)
    seen = [sigma] if reals is None else [np.cov(real.T) for real in reals[:20]]
    said = np.array([floor(torch.from_numpy(one).reshape(sigma.shape), n, m) for one in seen])
    error = (found.var() / repeats + said.var() / len(said)) ** 0.5
    assert error < 0.06 * found.mean()
    assert abs(said.mean() - found.mean()) < 3 * error + slack * found.mean()


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(
    ("d", "n", "m"),
    [
        (6, 300, None), (20, 90, 120), (40, 41, 39), (40, 20, 200),
        *every((6, 300, 900), (6, 600, 600), (12, 800, 1200), (20, 90, 400), (20, 80, None), (40, 300, 20),
               (40, 60, 60), (40, 20, 20), (40, 60, None), (100, 130, None), (100, 20, 22)),
    ],
)  # fmt: skip
def test_of_few_samples_and_of_many(name, d, n, m):
    rng = rng_of(3, d, n)
    beside_draws(covariance(rng, spectrum_of(name, d, rng)), n, m, 200, 0.025)


INVERSE = {
    "1/i": lambda d: 1 / np.arange(1, d + 1),
    "1/i^2": lambda d: np.arange(1, d + 1) ** -2.0,
    "flat": lambda d: np.ones(d),
}


def of_one_reference(spectrum: np.ndarray, n: int, m: int, references: int) -> list[float]:
    """What floor() says from each of some references, over the mean distance of fresh samples from them.

    The means' part of a distance varies most, and its expectation is known: (1/N1 + 1/N2) of the trace.
    """
    rng = rng_of(9, len(spectrum), n, m)
    said, fresh = [], []
    for _ in range(references):
        x, y = (rng.standard_normal((count, len(spectrum))) * np.sqrt(spectrum) for count in (n, m))
        a, b = ((one - one.mean(0)) / np.sqrt(len(one) - 1) for one in (x, y))
        if m > len(spectrum):
            b = np.linalg.qr(b, "r")
        cross = float(torch.linalg.svdvals(torch.from_numpy(a @ b.T)).sum())
        fresh.append((a**2).sum() + (b**2).sum() - 2 * cross)
        said.append(floor(torch.from_numpy(b.T @ b), n, m))
    expected = np.mean(fresh) + (1 / n + 1 / m) * spectrum.sum()
    return [one / expected for one in said]


@pytest.mark.parametrize("name", INVERSE)
@pytest.mark.parametrize(("n", "m"), [(75, 75), (75, 300), (300, 75), (300, 300)])
def test_within_a_fifth_from_any_reference(name, n, m):
    """Of fewer samples than features and of more: the eigenvalues of a sample are not those of its source."""
    ratios = of_one_reference(INVERSE[name](160), n, m, 6)
    assert min(ratios) > 0.8 and max(ratios) < 1.25


@pytest.mark.slow
@pytest.mark.parametrize("name", INVERSE)
@pytest.mark.parametrize(("n", "m"), [(75, 75), (75, 1000), (300, 300), (1000, 1000)])
def test_within_a_fifth_for_as_many_features_as_inceptions(name, n, m):
    ratios = of_one_reference(INVERSE[name](2048), n, m, 3)
    assert min(ratios) > 0.8 and max(ratios) < 1.25


def test_as_cheap_for_a_reference_of_any_size():
    """Nothing is drawn: a billion samples would not fit."""
    sigma = torch.from_numpy(covariance(rng_of(6), spectrum_of("random", 64, rng_of(6))))
    assert floor(sigma, 500, 10**9) == pytest.approx(floor(sigma, 500), rel=1e-4)
    assert floor(sigma, 10**9, 10**9) == pytest.approx(0, abs=1e-4)


def test_falls_with_more_samples():
    sigma = torch.from_numpy(covariance(rng_of(7), spectrum_of("random", 64, rng_of(7))))
    values = [floor(sigma, n, 1000) for n in (5, 20, 60, 250, 300, 1000, 10_000)]
    assert values == sorted(values, reverse=True)


def test_of_a_reference_of_unknown_samples_it_is_less():
    """The least that it can be."""
    x = draws(rng_of(8), 1, 100, np.eye(40))[0]
    sigma = torch.from_numpy(np.cov(x.T))
    assert floor(sigma, 60) < 0.7 * floor(sigma, 60, 100)


def test_of_a_covariance_that_so_few_samples_cannot_have():
    """Of full rank by 10 samples of 40 features: it was smoothed, and is taken as it is."""
    sigma = torch.from_numpy(covariance(rng_of(8), spectrum_of("random", 40, rng_of(8))))
    rng = rng_of(8, 1)
    found = distances(draws(rng, 300, 12, sigma.numpy()), draws(rng, 300, 10, sigma.numpy()), sigma.numpy())
    assert floor(sigma, 12, 10) == pytest.approx(found.mean(), rel=0.05)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 10])
@pytest.mark.parametrize("d", [1, 2, 50])
def test_of_the_fewest_samples_it_is_finite(d, count):
    for seed in range(5):
        x = draws(rng_of(21, d, count, seed), 1, count, np.eye(d))[0]
        sigma = torch.from_numpy(np.cov(x.T)).reshape(d, d)
        assert 0 < floor(sigma, 10, count) < 8 * float(sigma.trace())


def test_directions_without_variance_do_not_count():
    sigma = np.diag([2.0, 1.0, 0.5])
    wide = np.zeros((300, 300))
    wide[:3, :3] = sigma
    for n, m in ((500, 400), (12, 1000), (13, None)):
        assert floor(torch.from_numpy(wide), n, m) == pytest.approx(
            floor(torch.from_numpy(sigma), n, m), rel=1e-9
        )
    assert floor(torch.zeros(4, 4), 100, 100) == floor(torch.zeros(0, 0), 100, 100) == 0


def test_rounding_below_zero_does_not_count():
    low = rng_of(8).standard_normal((30, 3))
    sigma = torch.from_numpy(low @ low.T)
    assert torch.linalg.eigvalsh(sigma)[0] < 0
    values = torch.linalg.eigvalsh(sigma)[-3:]
    assert floor(sigma, 200, 300) == pytest.approx(floor(values.diag(), 200, 300), rel=1e-9)


def test_single_precision():
    sigma = torch.from_numpy(covariance(rng_of(9), spectrum_of("random", 10, rng_of(9))))
    assert floor(sigma.float(), 500, 500) == pytest.approx(floor(sigma, 500, 500), rel=1e-5)


@pytest.mark.parametrize(("n", "m"), [(1, 10), (10, 1)])
def test_no_floor_of_one_image(n, m):
    with pytest.raises(UserError, match="at least 2"):
        floor(torch.eye(3), n, m)


# the distance of endless samples


def apart(d: int, *seed: int) -> tuple[np.ndarray, Gaussian, float]:
    """A covariance, a reference with other mean and spectrum, the same eigenvectors, and their distance."""
    rng = rng_of(10, d, *seed)
    l1, l2, mu = rng.uniform(0.2, 2, d), rng.uniform(0.2, 2, d), 0.2 * rng.standard_normal(d)
    q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    truth = (mu**2).sum() + ((np.sqrt(l1) - np.sqrt(l2)) ** 2).sum()
    sigma = q * l1 @ q.T
    other = q * l2 @ q.T
    return (sigma + sigma.T) / 2, gaussian(mu, (other + other.T) / 2), truth


@pytest.mark.parametrize(("d", "n"), [(8, 400), (24, 1500)])
def test_extrapolated_to_the_truth(d, n):
    sigma, reference, truth = apart(d)
    values, slopes, plain = [], [], []
    for seed in range(25):
        x = draws(rng_of(11, d, seed), 1, n, sigma)
        plain.append(
            distances(x, None, (reference.factor @ reference.factor.T).numpy(), reference.mu.numpy())[0]
        )
        found = frechet_infinity(torch.from_numpy(x[0]), reference, seed=seed)
        assert isinstance(found, Infinity)
        values.append(found.value)
        slopes.append(found.slope)
    error = np.std(values) / 5
    bias = np.mean(plain) - truth
    assert bias > 2 * error, "else this test says nothing"
    assert abs(np.mean(values) - truth) < 3 * error + 0.15 * bias
    assert abs(np.mean(values) - truth) < 0.5 * bias
    assert np.mean(slopes) == pytest.approx(bias * n, rel=0.5)  # what falls off with N


def test_of_one_distribution_it_is_near_zero_not_the_floor():
    """May be below 0: a line knows no bound."""
    d, n = 16, 800
    sigma = covariance(rng_of(12), spectrum_of("random", d, rng_of(12)))
    reference = gaussian(np.zeros(d), sigma)
    values = [
        frechet_infinity(torch.from_numpy(draws(rng_of(12, s), 1, n, sigma)[0]), reference).value
        for s in range(20)
    ]
    height = floor(torch.from_numpy(sigma), n)
    assert abs(np.mean(values)) < 0.35 * height
    assert min(values) < 0 < max(values)


def test_a_line_through_known_points():
    """Of two sizes, the line goes through both: at N it is the distance itself, at N / 2 that of a half."""
    sigma, reference, _ = apart(5, 1)
    other, mu = (reference.factor @ reference.factor.T).numpy(), reference.mu.numpy()
    x = draws(rng_of(13), 1, 6, sigma)[0]
    found = frechet_infinity(torch.from_numpy(x), reference, points=2, smallest=0.5)
    assert found.value + found.slope / 6 == pytest.approx(distances(x[None], None, other, mu)[0], rel=1e-9)
    halves = [distances(x[None, list(i)], None, other, mu)[0] for i in combinations(range(6), 3)]
    assert min(abs(found.value + found.slope / 3 - half) for half in halves) < 1e-9


def test_extrapolation_by_seed():
    sigma, reference, _ = apart(6)
    x = torch.from_numpy(draws(rng_of(14), 1, 100, sigma)[0])
    before = torch.get_rng_state()
    first = frechet_infinity(x, reference)
    assert frechet_infinity(x, reference, seed=0) == first
    assert frechet_infinity(x, reference, seed=1) != first
    assert frechet_infinity(x.float().double(), reference).value == pytest.approx(first.value, rel=1e-4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("n", [0, 1, 2, 29])
def test_too_few_to_extrapolate(n):
    _, reference, _ = apart(3)
    with pytest.raises(UserError, match=f"15 sample counts.*{n} images") as error:
        frechet_infinity(torch.zeros(n, 3, dtype=torch.float64), reference)
    assert "\n" not in str(error.value)


def test_just_enough_to_extrapolate():
    sigma, reference, _ = apart(3)
    found = frechet_infinity(torch.from_numpy(draws(rng_of(15), 1, 30, sigma)[0]), reference)
    assert np.isfinite(found.value) and np.isfinite(found.slope)


# its spread


def test_interval_around_the_value():
    sigma, reference, _ = apart(6)
    for seed, n in enumerate((2, 5, 30, 200)):
        x = draws(rng_of(16, seed), 1, n, sigma)
        value = distances(x, None, (reference.factor @ reference.factor.T).numpy(), reference.mu.numpy())[0]
        found = bootstrap(torch.from_numpy(x[0]), reference, draws=40)
        assert 0 <= found.low <= value <= found.high and found.std > 0
        wide, narrow = (bootstrap(torch.from_numpy(x[0]), reference, draws=40, level=p) for p in (0.99, 0.5))
        assert wide.low <= found.low <= narrow.low <= narrow.high <= found.high <= wide.high
        assert wide.std == narrow.std == found.std


def test_interval_by_seed():
    sigma, reference, _ = apart(6)
    x = torch.from_numpy(draws(rng_of(17), 1, 50, sigma)[0])
    before = torch.get_rng_state()
    first = bootstrap(x, reference, draws=30)
    assert bootstrap(x, reference, draws=30, seed=0) == first
    assert bootstrap(x, reference, draws=30, seed=1) != first
    assert torch.equal(torch.get_rng_state(), before)


def test_interval_of_one_dimension_by_numpy():
    """d = 1 has a closed form, (mu - m)² + (s - t)², so a bootstrap of many draws is a line of NumPy."""
    rng = rng_of(18)
    x = 2 + 0.5 * rng.standard_normal(80)
    reference = gaussian(np.zeros(1), np.eye(1))
    again = rng.choice(x, (20_000, 80))
    values = again.mean(1) ** 2 + (again.std(1, ddof=1) - 1) ** 2
    value = x.mean() ** 2 + (x.std(ddof=1) - 1) ** 2
    low, high = value + np.quantile(values - values.mean(), [0.025, 0.975])
    found = bootstrap(torch.from_numpy(x[:, None]), reference, draws=2000)
    assert found.std == pytest.approx(values.std(), rel=0.07)
    assert found.low == pytest.approx(low, abs=0.15 * (high - low))
    assert found.high == pytest.approx(high, abs=0.15 * (high - low))


def coverage(d: int, n: int, repeats: int, level: float) -> tuple[float, float]:
    """How often the interval holds the mean of the distance at n samples, and its std over the true one."""
    sigma, reference, _ = apart(d, 2)
    other, mu = (reference.factor @ reference.factor.T).numpy(), reference.mu.numpy()
    truth = distances(draws(rng_of(19, d), 3000, n, sigma), None, other, mu)
    inside, spreads = 0, []
    for seed in range(repeats):
        x = torch.from_numpy(draws(rng_of(19, d, seed), 1, n, sigma)[0])
        found = bootstrap(x, reference, draws=100, level=level, seed=seed)
        inside += found.low <= truth.mean() <= found.high
        spreads.append(found.std)
    return inside / repeats, float(np.mean(spreads) / truth.std())


@pytest.mark.exhaustive
@pytest.mark.parametrize(("d", "n"), [(5, 150), (20, 200)])
def test_how_often_the_interval_holds_the_mean(d, n):
    """95% of 100 repeats, loosely: 4 standard errors are 9%. In 20 dimensions the resamples' own quantiles,
    which lie higher, hold it in 25."""
    share, spread = coverage(d, n, 100, 0.95)
    assert 0.86 <= share <= 1
    assert 0.8 < spread < 1.4


def test_half_the_level_holds_it_half_as_often():
    share, spread = coverage(5, 60, 30, 0.5)
    assert 0.8 < spread < 1.4
    assert 0.25 < share < 0.75


# of no more samples than features


@pytest.mark.parametrize("rank", [3, 40, 300])
def test_choices_from_few_samples_beside_their_covariances(rank):
    """From the centred samples as from the covariance of a choice, which may hold one several times."""
    d, rng = 60, rng_of(22, rank)
    x = torch.from_numpy(3 + draws(rng, 1, 20, np.diag(spectrum_of("decaying", d, rng)))[0])
    y = rng.standard_normal((rank + 1, d))
    reference = gaussian(y.mean(0), np.cov(y.T))
    subsets = Subsets(x, reference)
    assert subsets.few
    for chosen in (rng.integers(0, 20, 20), np.arange(20), np.array([3, 3]), np.array([7, 1, 7, 2])):
        some = x[chosen]
        plain = distances(some.numpy()[None], None, np.cov(y.T), y.mean(0))[0]
        assert subsets.distance(torch.from_numpy(chosen)) == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize("draws", [1, 0, -1])
def test_no_interval_of_one_resample(draws):
    with pytest.raises(UserError, match="no spread"):
        bootstrap(torch.randn(5, 3).double(), gaussian(np.zeros(3), np.eye(3)), draws=draws)
    with pytest.raises(ValidationError) if draws else nullcontext():
        Evaluation(bootstrap=draws)


@pytest.mark.parametrize("count", [30, 400], ids=["of low rank", "of full rank"])
def test_fid_tells_the_floor_of_the_reference(count):
    """By the factor of its covariance where that is narrow, which has the same eigenvalues."""
    features = torch.from_numpy(rng_of(21).standard_normal((count, 120)) / np.arange(1, 121))
    sets = []
    for part in (features, features[:20]):
        statistics = Statistics()
        statistics.update(part)
        sets.append(FeatureSet(statistics))
    told = Fid().compute(Inputs(images=sets[1], compared=sets[0], options={}, features="inception"))
    assert told["fid_floor"] == pytest.approx(floor(sets[0].statistics.sigma, 20, count), rel=1e-9)
