"""Runs without images: labels by their shares, and nothing to learn from by mistake."""

from __future__ import annotations

import pytest
import torch

from diffkd.data.absent import NoData
from diffkd.errors import UserError

SHAPE = (1, 8, 8)


def test_labels_are_drawn_by_their_shares():
    unseen = NoData(kind="none", class_counts=[6, 0, 2]).of(SHAPE, 3)
    x0, cond = unseen.batch(8000, torch.Generator().manual_seed(0))
    labels = cond["class_labels"]
    assert x0.shape == (8000, *SHAPE) and bool(x0.isnan().all())
    shares = torch.bincount(labels, minlength=3) / 8000
    assert shares[1] == 0 and abs(shares[0] - 0.75) < 0.025  # 5 standard errors
    again = unseen.batch(8000, torch.Generator().manual_seed(0))[1]["class_labels"]
    assert torch.equal(labels, again) and len(unseen.indices(5, torch.Generator())) == 5


def test_classes_are_alike_by_default():
    unseen = NoData(kind="none").of(SHAPE, 4)
    labels = unseen.batch(8000, torch.Generator().manual_seed(0))[1]["class_labels"]
    chi2 = float(((torch.bincount(labels, minlength=4) - 2000.0) ** 2 / 2000).sum())
    assert unseen.class_counts == [1, 1, 1, 1] and chi2 < 21  # 3 degrees of freedom: 0.01%


def test_an_unconditional_model_has_no_labels():
    unseen = NoData(kind="none").of(SHAPE, None)
    assert unseen.batch(3, torch.Generator())[1] == {} and len(unseen) == 0
    assert unseen.uint8(slice(2)).shape == (2, *SHAPE)
    assert unseen.digest() != NoData(kind="none").of(SHAPE, 2).digest()


@pytest.mark.parametrize(("counts", "classes"), [([1, 1], 3), ([0, 0, 0], 3), ([1], None)])
def test_counts_that_do_not_fit_the_model(counts, classes):
    with pytest.raises(UserError, match=r"data.class_counts .* does not fit the teacher"):
        NoData(kind="none", class_counts=counts).of(SHAPE, classes)


def test_there_is_nothing_to_train_a_teacher_on():
    with pytest.raises(UserError, match="data kind none has no images"):
        NoData(kind="none").load()
