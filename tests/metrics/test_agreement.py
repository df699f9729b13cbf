"""Agreement of a student with its teacher, beside NumPy and at its ends."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from diffkd.errors import UserError
from diffkd.metrics.agreement import Agreement
from diffkd.metrics.base import Batch
from tests.metrics.test_statistics import in_processes


def pictures(n: int, *seed: int, size: int = 6, channels: int = 3) -> np.ndarray:
    return np.random.default_rng([26, n, *seed]).integers(0, 256, (n, size, size, channels), dtype=np.uint8)


def features(n: int, d: int, *seed: int) -> np.ndarray:
    rng = np.random.default_rng([27, n, d, *seed])
    return rng.standard_normal((n, d)) * np.linspace(0.5, 3, d) + 7


def paired(images, teacher_images, own, teachers) -> Batch:
    return Batch(0, images, own, teacher_images, teachers)


def agreement(images, teacher_images, own, teachers, sizes=(10_000,)) -> dict[str, float | None]:
    made = Agreement(own.shape[1])
    arrays = [torch.from_numpy(a) for a in (images, teacher_images, own, teachers)]
    start = 0
    for size in [*sizes, len(images)]:
        batch = [a[start : start + size] for a in arrays]
        if len(batch[0]):
            made.update(paired(*batch))
        start += size
    return made.result()


def by_numpy(images, teacher_images, own, teachers) -> tuple[float, float]:
    error = ((images.astype(float) - teacher_images.astype(float)) ** 2).mean()
    psnr = 20 * math.log10(255) - 10 * math.log10(error)
    moved = math.sqrt(((own.astype(float) - teachers) ** 2).sum(1).mean())
    unrelated = math.sqrt(2 * teachers.astype(float).var(0, ddof=1).sum())
    return psnr, moved / unrelated


@pytest.mark.parametrize("sizes", [(10_000,), (1,), (7, 1, 30), (20,)])
@pytest.mark.parametrize("channels", [1, 3])
def test_beside_numpy(sizes, channels):
    x, y = pictures(40, 1, channels=channels), pictures(40, 2, channels=channels)
    a, b = features(40, 9, 1), features(40, 9, 2) + 0.3
    found = agreement(x, y, a, b, sizes)
    assert list(found) == ["psnr", "feature_distance"]
    assert tuple(found.values()) == pytest.approx(by_numpy(x, y, a, b), rel=1e-10)


def test_off_by_one_everywhere():
    """uint8 must not wrap around: 0 - 1 is -1."""
    x = np.zeros((5, 4, 4, 3), np.uint8)
    a = features(5, 3)
    assert agreement(x, x + 1, a, a)["psnr"] == pytest.approx(20 * math.log10(255))
    assert agreement(x + 1, x, a, a)["psnr"] == pytest.approx(20 * math.log10(255))
    assert agreement(x, x + 255, a, a)["psnr"] == pytest.approx(0, abs=1e-12)


def test_equal_images():
    x, a = pictures(12), features(12, 5)
    found = agreement(x, x.copy(), a, a.copy())
    assert found == {"psnr": None, "feature_distance": 0.0}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_unrelated_images():
    """Two sets of one distribution: 1 within 4 standard errors, about 0.5 / (N d)^½."""
    a, b = features(4000, 20, 1), features(4000, 20, 2)
    found = agreement(pictures(4000, 1, size=2), pictures(4000, 2, size=2), a, b, (512,) * 8)
    assert found["feature_distance"] == pytest.approx(1, abs=0.01)
    uniform = 10 * math.log10(255**2 / (2 * (256**2 - 1) / 12))  # variance of 0, ..., 255
    assert found["psnr"] == pytest.approx(uniform, abs=0.1)


def test_single_precision_is_summed_in_double():
    x, y = pictures(30, 1), pictures(30, 2)
    a, b = features(30, 9, 1).astype(np.float32), features(30, 9, 2).astype(np.float32)
    assert agreement(x, y, a, b) == agreement(x, y, a.astype(np.float64), b.astype(np.float64))


def test_the_spread_is_the_teachers():
    """A student that is collapsed is measured by the teacher's spread: 1 / 2^½ from the mean."""
    b = features(5000, 8, 1)
    a = np.tile(b.mean(0), (5000, 1))
    x = pictures(5000, 1, size=1)
    assert agreement(x, x, a, b)["feature_distance"] == pytest.approx(0.5**0.5, rel=1e-3)


def test_a_teacher_without_spread_does_not_pass_for_agreement():
    """All the teacher's images are one, and the student's are others: 0 would mean equal."""
    b = np.tile(features(1, 8), (20, 1))
    a = features(20, 8, 3)
    found = agreement(pictures(20, 1), pictures(20, 2), a, b)["feature_distance"]
    assert found is None or found > 1


@pytest.mark.parametrize("sizes", [[40], [39, 1], [0, 40], [13, 0, 27]])
def test_over_processes(sizes):

    x, y, a, b = pictures(40, 1), pictures(40, 2), features(40, 9, 1), features(40, 9, 2)
    cuts = np.cumsum(sizes)[:-1]
    members = []
    for parts in zip(*(np.split(array, cuts) for array in (x, y, a, b)), strict=True):
        member = Agreement(9)
        if len(parts[0]):
            member.update(paired(*(torch.from_numpy(part) for part in parts)))
        members.append(member)
    in_processes(members, lambda member, add: member.merge_across(add))
    for member in members:
        assert tuple(member.result().values()) == pytest.approx(by_numpy(x, y, a, b), rel=1e-10)


def test_one_image_has_no_spread():
    x, a = pictures(1), features(1, 4)
    with pytest.raises(UserError, match="at least 2"):
        agreement(x, x, a, a)
