"""KID and CMMD beside double loops and sums over all subsets, in NumPy."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from diffkd.errors import UserError
from diffkd.metrics import clip_mmd
from diffkd.metrics.base import FeatureSet, Inputs
from diffkd.metrics.clip_mmd import cmmd
from diffkd.metrics.distances import squared_distances
from diffkd.metrics.kid import KernelDistance, Kid, kernel_distance
from diffkd.metrics.statistics import Statistics


def features(n: int, d: int, *seed: int) -> np.ndarray:
    return np.random.default_rng([22, n, d, *seed]).standard_normal((n, d))


def unbiased(
    x: np.ndarray, y: np.ndarray, degree: int = 3, gamma: float | None = None, coef: float = 1.0
) -> float:
    """Bińkowski et al. 2018, equation 4: sums over i != j within the sets, over all pairs between them."""
    gamma = 1 / x.shape[1] if gamma is None else gamma

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (gamma * (a * b).sum() + coef) ** degree

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    xy = sum(k(a, b) for a in x for b in y) / (n * m)
    return xx + yy - 2 * xy


def kid(x: np.ndarray, y: np.ndarray, **options: object) -> KernelDistance:
    return kernel_distance(torch.from_numpy(x), torch.from_numpy(y), **options)


@pytest.mark.parametrize(("n", "d"), [(2, 1), (3, 4), (25, 12)])
@pytest.mark.parametrize(
    "options", [{}, {"degree": 1}, {"degree": 2, "gamma": 0.7}, {"coef": 0.0}, {"gamma": 1.0, "coef": 2.5}]
)
def test_one_subset_of_all_is_the_whole(n, d, options):
    x, y = features(n, d, 1), 1.5 * features(n, d, 2) + 0.3
    for size in (n, 1000):
        ours = kid(x, y, subsets=1, subset_size=size, **options)
        assert ours.mean == pytest.approx(unbiased(x, y, **options), rel=1e-11)
        assert ours.std is None


def test_the_whole_does_not_depend_on_the_order():
    x, y = features(30, 6, 1), features(30, 6, 2) + 1
    ours = kid(x, y, subsets=7, subset_size=30)
    assert ours.mean == pytest.approx(unbiased(x, y), rel=1e-11)


@pytest.mark.parametrize("n", [2, 9, 40])
@pytest.mark.parametrize("m", [9, 30])
@pytest.mark.parametrize(("subsets", "size"), [(1, 3), (2, 3), (20, 9), (20, 8), (7, 1000)])
def test_a_spread_is_of_several_subsets_none_of_them_a_whole_set(n, m, subsets, size):
    """Subsets that are all the same spread by rounding errors, and those of one set alone by too little."""
    ours = kid(features(n, 4, 1), features(m, 4, 2), subsets=subsets, subset_size=size)
    if subsets > 1 and size < min(n, m):
        assert ours.std is not None and ours.std > 1e-6
    else:
        assert ours.std is None


def test_a_record_has_no_spread_where_there_is_none():
    x, y = (torch.from_numpy(features(30, 4, seed)) for seed in (1, 2))
    sets = [FeatureSet(Statistics(), one) for one in (x, y)]
    for size, keys in ((1000, {"kid"}), (30, {"kid"}), (29, {"kid", "kid_std"})):
        metric = Kid(kid_subset_size=size)
        assert metric.compute(Inputs(*sets, metric.options(30, 30), "toy")).keys() == keys


def test_subsets_beside_all_there_are():
    """Drawn without replacement, each of the 10 x 15 pairs of subsets is as likely: their mean is the
    estimate from the whole sets."""
    x, y = features(5, 3, 1), features(6, 3, 2) + 0.5
    every = [
        unbiased(x[list(i)], y[list(j)]) for i in combinations(range(5), 3) for j in combinations(range(6), 3)
    ]
    assert np.mean(every) == pytest.approx(unbiased(x, y), rel=1e-10)
    ours = kid(x, y, subsets=4000, subset_size=3)
    assert abs(ours.mean - np.mean(every)) < 4 * np.std(every) / 4000**0.5
    assert ours.std == pytest.approx(np.std(every), rel=0.06)


def test_two_subsets_and_the_deviation_of_one():
    """std has divisor `subsets`: of two values, half their difference. They are two of those there are."""
    x, y = features(4, 2, 3), features(4, 2, 4) + 1
    every = [
        unbiased(x[list(i)], y[list(j)]) for i in combinations(range(4), 3) for j in combinations(range(4), 3)
    ]
    ours = kid(x, y, subsets=2, subset_size=3)
    for value in (ours.mean - ours.std, ours.mean + ours.std):
        assert min(abs(value - e) for e in every) < 1e-10
    assert ours.std > 1e-3


def test_subsets_are_no_larger_than_the_smaller_set():
    x, y = features(9, 3, 1), features(30, 3, 2) + 1
    with_nine = kid(x, y, subsets=20, subset_size=9, seed=3)
    assert kid(x, y, subsets=20, seed=3) == with_nine
    assert kid(y, x, subsets=3, subset_size=8).std > 0


def test_seeds():
    x, y = features(50, 4, 1), features(40, 4, 2)
    before = torch.get_rng_state()
    first = kid(x, y, subsets=5, subset_size=10)
    assert kid(x, y, subsets=5, subset_size=10, seed=0) == first
    assert kid(x, y, subsets=5, subset_size=10, seed=1) != first
    assert torch.equal(torch.get_rng_state(), before)


def test_unbiased_for_one_distribution():
    """Around 0, as often below as above; the biased estimate would be 3 standard errors off by far."""
    values = []
    for seed in range(400):
        x, y = features(40, 8, seed, 1), features(60, 8, seed, 2)
        values.append(kid(x, y, subsets=3, subset_size=25).mean)
    error = np.std(values) / 400**0.5
    assert abs(np.mean(values)) < 3 * error
    assert 80 < sum(v < 0 for v in values) < 320
    bias = 2 * (2**3 - 1) / 25  # of k(x, x) counted as a pair, roughly
    assert bias > 10 * error


def test_unbiased_for_two():
    """x ~ N(0, I), y ~ N(m, I), degree 1: |m|² gamma."""
    shift = np.array([1.0, -0.5, 0.25])
    values = [
        kid(features(30, 3, s, 1), features(20, 3, s, 2) + shift, degree=1, subsets=2, subset_size=15).mean
        for s in range(400)
    ]
    expected = (shift**2).sum() / 3
    assert abs(np.mean(values) - expected) < 3 * np.std(values) / 400**0.5


def test_single_precision_is_summed_in_double():
    x, y = (features(40, 16, s).astype(np.float32) for s in (1, 2))
    fine = kid(x.astype(np.float64), y.astype(np.float64), subsets=4, subset_size=20)
    assert kid(x, y, subsets=4, subset_size=20) == fine
    assert cmmd(torch.from_numpy(x), torch.from_numpy(y)) == cmmd(
        torch.from_numpy(x).double(), torch.from_numpy(y).double()
    )


# CMMD


def biased(x: np.ndarray, y: np.ndarray, bandwidth: float = 10.0, scale: float = 1000.0) -> float:
    """Jayasumana et al. 2024, equation 4 with i = j counted, as their code has it."""

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * bandwidth**2)).mean()

    return scale * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 2), (1, 7, 3), (40, 25, 16), (60, 60, 1)])
@pytest.mark.parametrize("options", [{}, {"bandwidth": 0.5}, {"scale": 1.0, "bandwidth": 2.0}])
@pytest.mark.parametrize("block", [1 << 24, 1, 70, 250])
def test_cmmd_beside_numpy_in_blocks(monkeypatch, n, m, d, options, block):
    monkeypatch.setattr(clip_mmd, "BLOCK", block)
    x, y = unit(features(n, d, 1)), unit(features(m, d, 2) + 0.5)
    ours = cmmd(torch.from_numpy(x), torch.from_numpy(y), **options)
    assert ours == pytest.approx(biased(x, y, **options), rel=1e-9, abs=1e-10)
    assert cmmd(torch.from_numpy(y), torch.from_numpy(x), **options) == pytest.approx(
        ours, rel=1e-9, abs=1e-10
    )


def test_cmmd_of_equal_sets_and_of_two_points():
    x = unit(features(50, 8))
    assert abs(cmmd(torch.from_numpy(x), torch.from_numpy(x))) < 1e-9
    assert abs(cmmd(torch.from_numpy(x), torch.from_numpy(x[::-1].copy()))) < 1e-9
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert cmmd(one, other) == pytest.approx(1000 * (2 - 2 * np.exp(-2 / 200)), rel=1e-12)
    assert cmmd(one, other, bandwidth=1) == pytest.approx(1000 * (2 - 2 * np.exp(-1)), rel=1e-12)


def test_squared_distances():
    x, y = features(17, 5, 1), features(9, 5, 2)
    ours = squared_distances(torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_allclose(ours, ((x[:, None] - y[None]) ** 2).sum(-1), rtol=1e-12)
    assert (squared_distances(torch.from_numpy(x), torch.from_numpy(x)) >= 0).all()


# mistakes


@pytest.mark.parametrize("call", [kernel_distance, cmmd])
@pytest.mark.parametrize("shapes", [((5, 3), (5, 4)), ((5,), (5,)), ((5, 3, 1), (5, 3, 1)), ((5, 3), (3,))])
def test_features_that_do_not_fit(call, shapes):
    with pytest.raises(UserError, match="cannot be compared") as error:
        call(*(torch.zeros(shape) for shape in shapes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("n", "m"), [(1, 5), (5, 1), (0, 5), (1, 1)])
def test_too_few(n, m):
    with pytest.raises(UserError, match="at least 2") as error:
        kernel_distance(torch.zeros(n, 3), torch.zeros(m, 3))
    assert "\n" not in str(error.value)
    if min(n, m) == 0:
        with pytest.raises(UserError, match="at least 1"):
            cmmd(torch.zeros(n, 3), torch.zeros(m, 3))


@pytest.mark.parametrize("options", [{"subset_size": 1}, {"subset_size": 0}, {"subsets": 0}])
def test_subsets_of_one_or_none_are_refused(options):
    """A subset of one has no pair: its estimate is 0 / 0."""
    x = torch.from_numpy(features(10, 3))
    with pytest.raises(UserError, match="subset"):
        kernel_distance(x, x, **options)
