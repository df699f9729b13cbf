"""The Fréchet distance: closed forms, scipy's root, singular values of the data, invariances, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from diffkd.errors import UserError
from diffkd.metrics.frechet import _low_rank, distance, frechet_distance, gaussian

S1, S2 = np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([[3.0, -1.0], [-1.0, 1.0]])


def rng_of(*seed: int) -> np.random.Generator:
    return np.random.default_rng([20, *seed])


def rotation(rng: np.random.Generator, d: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((d, d)))[0]


def spd(rng: np.random.Generator, d: int) -> np.ndarray:
    a = rng.standard_normal((d, 3 * d + 2))
    return a @ a.T / (3 * d + 2)


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(0), np.cov(x, rowvar=False).reshape(x.shape[1], x.shape[1])


def of_data(x: np.ndarray, y: np.ndarray) -> float:
    """Without a covariance: tr (sigma1 sigma2)^½ is the nuclear norm of the product of the centred data."""
    a, b = (x - x.mean(0)) / np.sqrt(len(x) - 1), (y - y.mean(0)) / np.sqrt(len(y) - 1)
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross


@pytest.mark.parametrize("d", [1, 2, 7, 50])
def test_equal_covariances_leave_the_means(d):
    rng = rng_of(1, d)
    mu1, mu2, sigma = rng.standard_normal(d), rng.standard_normal(d), spd(rng, d)
    assert frechet_distance(mu1, sigma, mu2, sigma) == pytest.approx(((mu1 - mu2) ** 2).sum(), rel=1e-11)


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (1.0, 2.0), (0.3, 5.0), (0.0, 2.0), (1e-3, 1e3)])
@pytest.mark.parametrize("d", [1, 3, 64])
def test_round_gaussians(a, b, d):
    zero, eye = np.zeros(d), np.eye(d)
    assert frechet_distance(zero, a * a * eye, zero, b * b * eye) == pytest.approx(
        d * (a - b) ** 2, rel=1e-12
    )


@pytest.mark.parametrize("d", [2, 5, 40])
@pytest.mark.parametrize("decades", [1, 4, 9])
def test_shared_eigenvectors(d, decades):
    rng = rng_of(2, d, decades)
    q = rotation(rng, d)
    l1, l2 = (10 ** rng.uniform(-decades, 0, d) for _ in range(2))
    expected = ((np.sqrt(l1) - np.sqrt(l2)) ** 2).sum()
    zero = np.zeros(d)
    ours = frechet_distance(zero, q * l1 @ q.T, zero, q * l2 @ q.T)
    # a covariance is known to 1e-16 of its largest eigenvalue, and the root magnifies that for the smallest
    assert ours == pytest.approx(expected, rel=0, abs=1e-15 * d * 10 ** (decades / 2) + 1e-13)


def test_eigenvalues_exact_zero_in_one_or_both():
    l1, l2 = np.array([4.0, 0.0, 0.0, 1.0, 9.0]), np.array([1.0, 0.0, 4.0, 0.0, 16.0])
    zero = np.zeros(5)
    for q in (np.eye(5), rotation(rng_of(3), 5)):
        assert frechet_distance(zero, q * l1 @ q.T, zero, q * l2 @ q.T) == pytest.approx(7.0, abs=1e-6)
    assert frechet_distance(zero, np.diag(l1), zero, np.diag(l2)) == pytest.approx(7.0, abs=1e-12)


def test_two_by_two_by_hand():
    """tr (sigma1 sigma2)^½ = (tr(sigma1 sigma2) + 2 (det sigma1 det sigma2)^½)^½ = (6 + 2 6^½)^½."""
    mu1, mu2 = np.array([0.0, 0.0]), np.array([1.0, 2.0])
    by_hand = 5 + 8 - 2 * (6 + 2 * 6**0.5) ** 0.5
    assert by_hand == pytest.approx(6.397279504456861776, rel=1e-14)
    assert frechet_distance(mu1, S1, mu2, S2) == pytest.approx(6.397279504456861776, rel=0, abs=1e-12)


@pytest.mark.parametrize("d", [2, 3, 10, 33, 80])
def test_beside_scipys_root(d):
    rng = rng_of(4, d)
    for _ in range(5):
        s1, s2, mu1, mu2 = spd(rng, d), spd(rng, d), rng.standard_normal(d), rng.standard_normal(d)
        root = sqrtm(s1 @ s2)
        expected = ((mu1 - mu2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(root).real
        assert frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "m", "d"), [(200, 150, 12), (8, 30, 12), (8, 5, 12), (3, 40, 100), (2, 2, 30)])
def test_symmetric(n, m, d):
    rng = rng_of(5, n, m, d)
    one, two = moments(rng.standard_normal((n, d))), moments(rng.standard_normal((m, d)) * 2 + 1)
    assert frechet_distance(*one, *two) == pytest.approx(frechet_distance(*two, *one), rel=1e-10)


def sets() -> dict[str, np.ndarray]:
    rng = rng_of(6)
    plain = rng.standard_normal((100, 40))
    low = rng.standard_normal((100, 3)) @ rng.standard_normal((3, 40))
    return {
        "plain": plain,
        "one feature": plain[:, :1],
        "fewer samples than features": plain[:17],
        "as many samples as features": plain[:40],
        "one more": plain[:41],
        "two samples": plain[:2],
        "rank 3": low,
        "rank 3 far from the origin": low + 1e4,
        "nearly singular": low + 1e-7 * plain,
        "nearly singular by rounding": low + 1e-15 * plain,
        "float32 features": low.astype(np.float32).astype(np.float64),
        "the same feature twice": np.concatenate([plain, plain[:, :1]], 1),
        "a dead feature": np.concatenate([plain, np.zeros((100, 1))], 1),
        "one point": np.tile(plain[:1], (9, 1)),
        "zeros": np.zeros((9, 40)),
        "tiny": plain * 1e-12,
        "huge": plain * 1e12,
        "tiny rank 3": low * 1e-12,
        "huge, few": plain[:17] * 1e12,
        "features of all scales": plain * np.logspace(-12, 12, 40),
        "features of some scales": plain * np.logspace(-5, 3, 40),
        "one that dominates": plain * np.r_[1e8, np.ones(39)],
        "geometric spectrum": plain * 0.5 ** np.arange(40),
    }


@pytest.mark.parametrize("name", sets())
def test_distance_from_itself(name):
    """0 up to rounding, whatever the set. Beside it: a set apart is far from 0."""
    x = sets()[name]
    mu, sigma = moments(x)
    here = frechet_distance(mu, sigma, mu, sigma)
    assert 0 <= here <= 1e-9 * np.trace(sigma)
    other = frechet_distance(mu, sigma, mu, 4 * sigma)  # (1 - 2)² tr
    assert other == pytest.approx(np.trace(sigma), rel=1e-9)


@pytest.mark.parametrize("name", sets())
def test_moved_by_the_mean_alone(name):
    x = sets()[name]
    mu, sigma = moments(x)
    step = np.sqrt(np.trace(sigma) + 1e-30) * rng_of(7).standard_normal(len(mu))
    expected = ((mu + step - mu) ** 2).sum()
    assert frechet_distance(mu, sigma, mu + step, sigma) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(
    ("n", "m", "d"),
    [(10, 10, 30), (10, 25, 30), (30, 30, 30), (31, 31, 30), (2, 200, 30), (2, 3, 100), (60, 90, 30)],
)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_of_few_samples_beside_the_data(n, m, d, scale):
    rng = rng_of(8, n, m, d)
    x, y = scale * rng.standard_normal((n, d)), scale * (1.5 * rng.standard_normal((m, d)) + 0.3)
    ours = frechet_distance(*moments(x), *moments(y))
    assert ours == pytest.approx(of_data(x, y), rel=1e-9)


def test_of_low_rank_beside_the_data():
    """Many samples in few directions, which the two sets share in part."""
    rng = rng_of(9)
    base = rng.standard_normal((6, 50))
    x = rng.standard_normal((300, 4)) @ base[:4]
    y = rng.standard_normal((200, 4)) @ base[2:] + 0.1
    assert frechet_distance(*moments(x), *moments(y)) == pytest.approx(of_data(x, y), rel=1e-6)


@pytest.mark.parametrize("turned", [False, True])
def test_orthogonal_subspaces(turned):
    rng = rng_of(10)
    x, y = np.zeros((50, 20)), np.zeros((40, 20))
    x[:, :7], y[:, 7:15] = rng.standard_normal((50, 7)), 3 * rng.standard_normal((40, 8))
    if turned:
        q = rotation(rng, 20)
        x, y = x @ q, y @ q
    (mu1, s1), (mu2, s2) = moments(x), moments(y)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(s1) + np.trace(s2)
    # turned, the covariances overlap by rounding, whose root counts
    assert frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-6 if turned else 1e-13)


@pytest.mark.parametrize("n", [9, 200])
def test_turned_and_moved_together(n):
    rng = rng_of(11, n)
    x, y = rng.standard_normal((n, 24)), rng.standard_normal((n, 24)) * 0.5 + 0.2
    q, shift = rotation(rng, 24), 10 * rng.standard_normal(24)
    before = frechet_distance(*moments(x), *moments(y))
    assert frechet_distance(*moments(x @ q + shift), *moments(y @ q + shift)) == pytest.approx(
        before, rel=1e-9
    )


@pytest.mark.parametrize("n", [9, 200])
@pytest.mark.parametrize("c", [1e-10, 1e-3, -2.0, 1e6])
def test_scaled_together(n, c):
    rng = rng_of(12, n)
    x, y = rng.standard_normal((n, 24)), rng.standard_normal((n, 24)) * 0.5 + 0.2
    before = frechet_distance(*moments(x), *moments(y))
    assert frechet_distance(*moments(c * x), *moments(c * y)) == pytest.approx(c * c * before, rel=1e-9)


def test_arrays_and_tensors_alike():
    rng = rng_of(13)
    arrays = (rng.standard_normal(6), spd(rng, 6), rng.standard_normal(6), spd(rng, 6))
    expected = frechet_distance(*arrays)
    assert isinstance(expected, float)
    assert frechet_distance(*(torch.from_numpy(a) for a in arrays)) == expected
    assert frechet_distance(arrays[0], torch.from_numpy(arrays[1]), arrays[2], arrays[3]) == expected
    assert frechet_distance(*(np.asfortranarray(a) for a in arrays)) == expected


def test_lists_are_not_rounded_to_single_precision():
    ours = frechet_distance([0.0, 0.0], S1.tolist(), [0.1, 0.2], (S2 / 3).tolist())
    assert ours == frechet_distance(np.zeros(2), S1, np.array([0.1, 0.2]), S2 / 3)


def test_an_array_that_is_read_only():
    mu, sigma = np.arange(3.0), np.eye(3)
    mu.flags.writeable = sigma.flags.writeable = False
    assert frechet_distance(mu, sigma, mu, sigma) == 0


def test_its_arguments_are_left_alone():
    rng = rng_of(14)
    arrays = [rng.standard_normal(6), spd(rng, 6), rng.standard_normal(6), spd(rng, 6)]
    before = [a.copy() for a in arrays]
    frechet_distance(*arrays)
    for a, b in zip(arrays, before, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_single_precision_is_not_computed_in(dtype):
    """As good as the numbers given: the same as of these in float64."""
    rng = rng_of(15)
    rough = [
        a.astype(dtype) for a in (rng.standard_normal(9), spd(rng, 9), rng.standard_normal(9), spd(rng, 9))
    ]
    fine = [a.astype(np.float64) for a in rough]
    assert frechet_distance(*rough) == frechet_distance(*fine)
    assert frechet_distance(*(torch.from_numpy(a) for a in rough)) == frechet_distance(*fine)


def test_rows_of_integers():
    assert frechet_distance([0, 0], [[4, 0], [0, 9]], [3, 4], [[1, 0], [0, 1]]) == pytest.approx(
        30, rel=1e-13
    )


def test_from_known_factors_the_same():
    rng = rng_of(16)
    one, two = moments(rng.standard_normal((12, 20))), moments(rng.standard_normal((90, 20)))
    g1, g2 = gaussian(*one), gaussian(*two)
    assert distance(g1, g2) == frechet_distance(*one, *two)
    for g, (mu, sigma) in ((g1, one), (g2, two)):
        np.testing.assert_allclose(g.factor @ g.factor.T, sigma, rtol=0, atol=1e-13)
        np.testing.assert_array_equal(g.mu, mu)
        assert float(g.trace) == pytest.approx(np.trace(sigma), rel=1e-13)


@pytest.mark.exhaustive
def test_as_wide_as_inception():
    """2048 features of 600 and 900 images: beside the data's singular values; 0 from itself."""
    rng = rng_of(17)
    spectrum = np.arange(1, 2049) ** -0.8
    x = rng.standard_normal((600, 2048)) * spectrum
    y = rng.standard_normal((900, 2048)) * spectrum * 1.1 + 0.01 * spectrum
    one, two = moments(x), moments(y)
    g1, g2 = gaussian(*one), gaussian(*two)
    assert distance(g1, g2) == pytest.approx(of_data(x, y), rel=1e-8)
    assert distance(g1, g1) <= 1e-9 * np.trace(one[1])


GOOD = (np.zeros(3), np.eye(3))


@pytest.mark.parametrize(
    ("mu", "sigma", "says"),
    [
        (np.zeros((3, 1)), np.eye(3), r"\(3, 1\)"),
        (np.zeros(3), np.eye(4), r"\(4, 4\)"),
        (np.zeros(3), np.ones((3, 4)), r"\(3, 4\)"),
        (np.zeros(3), np.ones(3), r"\(3,\)"),
        (np.zeros(3), np.ones((1, 3, 3)), r"\(1, 3, 3\)"),
        (np.float64(0.0), np.float64(1.0), r"\(\)"),
        (np.zeros(0), np.zeros((0, 0)), r"\(0,\)"),
        (np.array([0, np.nan, 0]), np.eye(3), "finite"),
        (np.array([0, np.inf, 0]), np.eye(3), "finite"),
        (np.zeros(3), np.diag([1, np.nan, 1]), "finite"),
        (np.zeros(3), np.diag([1, np.inf, 1]), "finite"),
        (np.zeros(3), np.diag([1, -np.inf, 1]), "finite"),
        (np.zeros(3), np.eye(3) + np.array([[0, 0.1, 0], [0, 0, 0], [0, 0, 0]]), "symmetric"),
        (np.zeros(3), 1e-12 * (np.eye(3) + np.array([[0, 1e-3, 0], [0, 0, 0], [0, 0, 0]])), "symmetric"),
        (np.zeros(3), np.triu(np.ones((3, 3))), "symmetric"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_what_is_no_gaussian(mu, sigma, says, first):
    arguments = (mu, sigma, *GOOD) if first else (*GOOD, mu, sigma)
    with pytest.raises(UserError, match=says) as error:
        frechet_distance(*arguments)
    assert "\n" not in str(error.value)


def test_other_numbers_of_features():
    with pytest.raises(UserError, match="3.*4") as error:
        frechet_distance(*GOOD, np.zeros(4), np.eye(4))
    assert "\n" not in str(error.value)


def test_nearly_symmetric_is_rounding():
    rng = rng_of(18)
    s1, s2 = spd(rng, 8), spd(rng, 8)
    rounded = s1 + 1e-9 * rng.standard_normal((8, 8))
    zero = np.zeros(8)
    expected = frechet_distance(zero, (rounded + rounded.T) / 2, zero, s2)
    assert frechet_distance(zero, rounded, zero, s2) == pytest.approx(expected, rel=1e-12)


def test_a_named_set_is_named():
    with pytest.raises(UserError, match="^ref.npz: "):
        gaussian(np.zeros(2), np.eye(3), "ref.npz")


@pytest.mark.parametrize(
    ("rank", "narrow"), [(0, True), (1, True), (14, True), (15, True), (16, False), (60, False)]
)
def test_a_low_rank_is_factored_without_eigenvectors(rank, narrow):
    """d / 4 at most. Whatever lies off the diagonal is seen: it is not a covariance then."""
    low = torch.randn(60, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    sigma = low @ low.T
    found = _low_rank(sigma)
    assert (found is not None) == narrow
    if found is not None:
        assert found.shape == (60, rank) and torch.allclose(found @ found.T, sigma, rtol=0, atol=1e-12)
    crossed = sigma.diagonal().diag() + 0
    crossed[0, 1] = crossed[1, 0] = 100 + 2 * crossed.max()
    assert _low_rank(crossed) is None
    with pytest.raises(UserError, match="negative eigenvalues"):
        gaussian(torch.zeros(60), crossed)
