"""The Inception Score beside NumPy, at its ends, and summed in any order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffkd.errors import UserError
from diffkd.metrics.score import ScoreSums, inception_score


def probabilities(n: int, classes: int, *seed: int, sharp: float = 2.0) -> np.ndarray:
    logits = sharp * np.random.default_rng([24, n, classes, *seed]).standard_normal((n, classes))
    p = np.exp(logits)
    return p / p.sum(1, keepdims=True)


def plain(p: np.ndarray, splits: int) -> tuple[float, float]:
    """As Salimans et al. wrote it: part i is p[i * N // splits : (i + 1) * N // splits]."""
    scores = []
    for i in range(splits):
        part = p[i * len(p) // splits : (i + 1) * len(p) // splits]
        marginal = part.mean(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(part > 0, part * (np.log(part) - np.log(marginal)), 0)
        scores.append(np.exp(terms.sum(1).mean()))
    return np.mean(scores), np.std(scores)


def score(p: np.ndarray, splits: int) -> tuple[float, float | None]:
    return inception_score(torch.from_numpy(p), splits)


@pytest.mark.parametrize(("n", "classes"), [(20, 3), (57, 10), (100, 1008), (23, 1), (203, 5)])
@pytest.mark.parametrize("splits", [1, 2, 7, 10])
def test_beside_numpy(n, classes, splits):
    """Whether or not the splits are of one size."""
    p = probabilities(n, classes)
    (mean, std), (expected, spread) = score(p, splits), plain(p, splits)
    assert mean == pytest.approx(expected, rel=1e-10)
    assert std is None if splits == 1 else std == pytest.approx(spread, rel=1e-10, abs=1e-12)


def test_ten_splits_by_default():
    p = probabilities(45, 4)
    assert inception_score(torch.from_numpy(p)) == score(p, 10) != score(p, 9)


def test_splits_are_consecutive():
    """Each half holds one class: no score in either, though the whole has one."""
    p = np.repeat(np.eye(2), 6, axis=0)
    assert score(p, 2) == pytest.approx((1, 0))
    assert score(p, 1)[0] == pytest.approx(2)
    assert score(p[[0, 6, 1, 7, 2, 8, 3, 9]], 2) == pytest.approx((2, 0))


@pytest.mark.parametrize("classes", [2, 10, 1008])
def test_its_ends(classes):
    uniform = np.full((3 * classes, classes), 1 / classes)
    assert score(uniform, 3) == pytest.approx((1, 0), abs=1e-12)
    balanced = np.tile(np.eye(classes), (3, 1))
    assert score(balanced, 3) == pytest.approx((classes, 0), rel=1e-12, abs=1e-9)
    same = np.tile(np.eye(classes)[0], (3 * classes, 1))
    assert score(same, 3) == pytest.approx((1, 0), abs=1e-12)


def test_zeros_are_no_trouble():
    p = probabilities(60, 8, sharp=1.0)
    p[p < 0.08] = 0
    p[:, 3] = 0  # of a whole class
    p /= p.sum(1, keepdims=True)
    assert (p == 0).any(1).all()
    assert score(p, 4) == pytest.approx(plain(p, 4), rel=1e-12)


def test_probabilities_that_underflow():
    p = np.array([[1.0, 5e-324], [1e-300, 1.0], [1.0, 0.0], [0.5, 0.5]])
    assert score(p, 1)[0] == pytest.approx(plain(p, 1)[0], rel=1e-12)


def test_one_split_has_no_spread():
    assert score(probabilities(6, 5), 1)[1] is None and score(probabilities(6, 5), 2)[1] is not None


def test_single_precision_is_summed_in_double():
    p = probabilities(500, 100).astype(np.float32)
    assert score(p, 3) == score(p.astype(np.float64), 3)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "splits"), [(50, 10), (53, 10), (29, 3), (14, 7)])
def test_in_batches_in_any_order(n, splits, seed):
    rng = np.random.default_rng([25, n, splits, seed])
    p = probabilities(n, 12)
    cuts = np.sort(rng.integers(0, n + 1, 6))  # some batches are empty, some lie over several splits
    batches = list(zip(np.r_[0, cuts], np.split(p, cuts), strict=True))
    rng.shuffle(order := np.arange(len(batches)))
    sums = ScoreSums(n, splits)
    for i in order:
        first, batch = batches[i]
        sums.update(torch.from_numpy(batch), int(first))
    assert sums.score() == pytest.approx(plain(p, splits), rel=1e-11)


@pytest.mark.parametrize("sizes", [[20, 33], [0, 53], [53, 0, 0], [10, 0, 3, 40]])
def test_over_processes(sizes):
    """Sums of processes add up, also of one that saw no image. add: looked up in what all of them hold."""
    p = probabilities(53, 12)
    members = []
    for first, part in zip(np.cumsum([0, *sizes[:-1]]), np.split(p, np.cumsum(sizes)[:-1]), strict=True):
        member = ScoreSums(53, 5)
        if len(part):
            member.update(torch.from_numpy(part), int(first))
        members.append(member)
    given: list[list[torch.Tensor]] = []

    def listen(tensor: torch.Tensor) -> torch.Tensor:
        given[-1].append(tensor.clone())
        return tensor

    for member in members:  # first round: what each would give
        given.append([])
        member.merge_across(listen, 12)
    assert len({tuple((t.shape, t.dtype) for t in one) for one in given}) == 1
    totals = [torch.stack(tensors).sum(0) for tensors in zip(*given, strict=True)]
    for member in members:  # second: what each gets
        waiting = iter(totals)
        member.merge_across(lambda tensor, waiting=waiting: next(waiting), 12)
        assert member.score() == pytest.approx(plain(p, 5), rel=1e-11)


@pytest.mark.parametrize(("count", "splits"), [(9, 10), (10, 10), (19, 10), (1, 1), (0, 1), (5, 0), (5, -1)])
def test_splits_that_cannot_be(count, splits):
    """One of a single image scores 1, whatever the image is."""
    with pytest.raises(UserError, match=f"{splits} splits.*{count}") as error:
        inception_score(torch.full((count, 3), 1 / 3), splits)
    assert "\n" not in str(error.value)
