"""Precision, recall, density and coverage beside full matrices of distances in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffkd.errors import UserError
from diffkd.metrics import prdc
from diffkd.metrics.prdc import density_coverage, precision_recall


def features(n: int, d: int, *seed: int) -> np.ndarray:
    return np.random.default_rng([23, n, d, *seed]).standard_normal((n, d))


def between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))


def radii(x: np.ndarray, k: int) -> np.ndarray:
    """The k-th nearest, itself not counted."""
    distances = between(x, x)
    others = [np.delete(row, i) for i, row in enumerate(distances)]
    return np.array([np.sort(row)[k - 1] for row in others])


def by_loops(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """Precision, recall (Kynkäänniemi et al. 2019), density, coverage (Naeem et al. 2020)."""
    of_real, of_fake, distances = radii(real, k), radii(fake, k), between(real, fake)
    precision = np.mean(
        [any(distances[i, j] <= of_real[i] for i in range(len(real))) for j in range(len(fake))]
    )
    recall = np.mean([any(distances[i, j] <= of_fake[j] for j in range(len(fake))) for i in range(len(real))])
    balls = [[distances[i, j] <= of_real[i] for i in range(len(real))] for j in range(len(fake))]
    density = np.sum(balls) / (k * len(fake))
    coverage = np.mean([min(distances[i]) <= of_real[i] for i in range(len(real))])
    return precision, recall, density, coverage


def ours(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float, float, float]:
    a, b = torch.from_numpy(real), torch.from_numpy(fake)
    return (*precision_recall(a, b, k), *density_coverage(a, b, k))


@pytest.fixture(params=[1, 50, 333, 1 << 24])
def block(request, monkeypatch) -> int:
    monkeypatch.setattr(prdc, "BLOCK", request.param)
    return request.param


@pytest.mark.parametrize(("n", "m", "d"), [(60, 60, 2), (40, 71, 3), (71, 40, 8), (12, 90, 1), (90, 12, 20)])
@pytest.mark.parametrize("k", [1, 3, 5, 11])
def test_beside_numpy(block, n, m, d, k):
    real, fake = features(n, d, 1), 0.8 * features(m, d, 2) + 0.4
    assert ours(real, fake, k) == pytest.approx(by_loops(real, fake, k), rel=1e-12)


def test_the_values_of_that_are_not_all_0_or_1():
    for n, m, d in ((60, 60, 2), (40, 71, 3), (71, 40, 8)):
        found = by_loops(features(n, d, 1), 0.8 * features(m, d, 2) + 0.4, 1)
        assert all(0.2 < value < 0.97 for value in found)


def test_k_by_default():
    real, fake = torch.from_numpy(features(50, 3, 1)), torch.from_numpy(features(50, 3, 2))
    assert precision_recall(real, fake) == precision_recall(real, fake, 3) != precision_recall(real, fake, 1)
    assert density_coverage(real, fake) == density_coverage(real, fake, 5) != density_coverage(real, fake, 1)


def test_five_points_on_a_line():
    """Reals at 0, 1, 3, 7, k = 1: radii 1, 1, 2, 4. Fakes at 3.5, 8, 20: radii 4.5, 4.5, 12."""
    real, fake = torch.tensor([[0.0], [1.0], [3.0], [7.0]]), torch.tensor([[3.5], [8.0], [20.0]])
    # 3.5 lies in the balls of 3 (0.5 < 2) and 7 (3.5 < 4), 8 in that of 7 (1 < 4), 20 in none
    assert precision_recall(real, fake, 1) == pytest.approx((2 / 3, 1))
    assert density_coverage(real, fake, 1) == pytest.approx((3 / 3, 2 / 4))


def test_recall_goes_by_the_balls_of_the_fakes():
    real, fake = torch.tensor([[0.0], [1.0], [50.0]]), torch.tensor([[0.2], [0.9], [1.4]])
    assert precision_recall(real, fake, 1) == pytest.approx((1, 2 / 3))
    assert precision_recall(fake, real, 1) == pytest.approx((2 / 3, 1))


@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_identical_sets(block, shift):
    x = features(80, 6) + shift
    precision, recall, density, coverage = ours(x, x.copy(), 5)
    assert (precision, recall, coverage) == (1, 1, 1)
    assert 0.8 - 1e-9 <= density <= 1.2 + 1e-9  # k - 1 others, itself, and the k-th where rounding puts it


@pytest.mark.parametrize("gap", [100.0, 1e6])
def test_sets_far_apart(block, gap):
    x = features(40, 6, 1)
    assert ours(x, features(50, 6, 2) + gap, 3) == (0, 0, 0, 0)


def test_one_set_inside_the_other():
    """Fakes in a small part of the reals: precise, few recalled, few covered."""
    real, fake = features(300, 2, 1), 0.05 * features(300, 2, 2)
    precision, recall, density, coverage = ours(real, fake, 3)
    assert precision > 0.9 and recall < 0.1 and coverage < 0.2
    assert (precision, recall, density, coverage) == pytest.approx(by_loops(real, fake, 3))


@pytest.mark.parametrize("shift", [1e6, -1e6])
def test_far_from_the_origin(block, shift):
    real, fake = 0.01 * features(60, 5, 1) + shift, 0.008 * features(45, 5, 2) + 0.003 + shift
    expected = by_loops(real, fake, 3)
    assert ours(real, fake, 3) == pytest.approx(expected)
    assert expected == pytest.approx(by_loops(real - shift, fake - shift, 3))


def test_single_precision(block):
    real, fake = (features(50, 5, s).astype(np.float32) for s in (1, 2))
    expected = by_loops(real.astype(np.float64), fake.astype(np.float64), 3)
    assert ours(real, fake, 3) == pytest.approx(expected)


def test_single_precision_far_from_the_origin():
    real, fake = ((features(50, 5, s) + 1e4).astype(np.float32) for s in (1, 2))
    expected = by_loops(real.astype(np.float64), fake.astype(np.float64), 3)
    assert ours(real, fake, 3) == pytest.approx(expected)


def test_its_arguments_are_left_alone():
    real, fake = torch.from_numpy(features(30, 5, 1)), torch.from_numpy(features(30, 5, 2))
    before = real.clone(), fake.clone()
    precision_recall(real, fake)
    density_coverage(real, fake)
    assert torch.equal(real, before[0]) and torch.equal(fake, before[1])


def test_reals_that_come_twice(block):
    """k = 1: every real is its own nearest neighbour, no ball reaches anywhere. k = 3: balls as wide as the
    second nearest other."""
    once, fake = features(40, 3, 1), features(50, 3, 2)
    twice = np.concatenate([once, once])
    assert ours(twice, fake, 1)[0] == 0 and ours(twice, fake, 1)[3] == 0
    precision, recall, density, coverage = ours(twice, fake, 3)
    expected = by_loops(once, fake, 2 - 1)
    assert precision == pytest.approx(expected[0]) and coverage == pytest.approx(expected[3])
    assert density == pytest.approx(2 * expected[2] / 3)
    assert recall == pytest.approx(by_loops(once, fake, 3)[1])


def test_fakes_collapsed_to_one_point(block):
    """Precise where that point lies among the reals; nothing is recalled: the balls have no width."""
    real = features(60, 4, 1)
    inside, outside = np.tile(real.mean(0), (50, 1)), np.full((50, 4), 99.0)
    for fake in (inside, outside):
        expected = by_loops(real, fake, 3)
        assert ours(real, fake, 3) == pytest.approx(expected)
        assert expected[1] == 0
    assert by_loops(real, inside, 3)[0] == 1 and by_loops(real, outside, 3) == (0, 0, 0, 0)


def test_reals_collapsed_to_one_point(block):
    fake = features(60, 4, 1)
    real = np.tile(fake.mean(0), (50, 1))
    precision, recall, density, coverage = ours(real, fake, 3)
    assert (precision, recall, density, coverage) == (0, 1, 0, 0)


@pytest.mark.parametrize("call", [precision_recall, density_coverage])
def test_too_few_for_k(call):
    for n, m, k in ((3, 9, 3), (9, 3, 3), (5, 5, 5), (0, 9, 1), (1, 9, 1)):
        with pytest.raises(UserError, match=rf"more than {k} images") as error:
            call(torch.zeros(n, 2), torch.zeros(m, 2), k)
        assert "\n" not in str(error.value)
    x, y = features(4, 2, 1), features(4, 2, 2)
    precision, recall, density, coverage = by_loops(x, y, 3)  # just enough
    expected = (precision, recall) if call is precision_recall else (density, coverage)
    assert tuple(call(torch.from_numpy(x), torch.from_numpy(y), 3)) == pytest.approx(expected)


@pytest.mark.parametrize("call", [precision_recall, density_coverage])
@pytest.mark.parametrize("shapes", [((9, 3), (9, 4)), ((9,), (9,)), ((9, 3, 1), (9, 3, 1))])
def test_features_that_do_not_fit(call, shapes):
    with pytest.raises(UserError, match="cannot be compared") as error:
        call(*(torch.zeros(shape) for shape in shapes), k=3)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_numbers_that_prdc_prints():
    """Its README: two sets of 10,000 from N(0, I_1000), k = 5."""
    real, fake = (torch.from_numpy(features(10_000, 1000, s).astype(np.float32)) for s in (1, 2))
    precision, recall = precision_recall(real, fake, 5)
    density, coverage = density_coverage(real, fake, 5)
    assert precision == pytest.approx(0.4772, abs=0.02) and recall == pytest.approx(0.4705, abs=0.02)
    assert density == pytest.approx(1.0555, abs=0.05) and coverage == pytest.approx(0.9735, abs=0.01)
