"""Held-out images and hidden labels: every class in proportion, and what cannot be split."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffkd.core.losses import UNLABELLED
from diffkd.data import splits
from diffkd.data.images import Images
from diffkd.errors import UserError


def dataset(counts, shape=(1, 2, 2)):
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(counts)])
    pixels = np.arange(len(labels), dtype=np.uint8)[:, None, None, None] + np.zeros(shape, np.uint8)
    return Images("some", pixels, labels, [f"class {k}" for k in range(len(counts))])


def test_every_class_in_proportion_and_no_image_on_both_sides():
    images = dataset([60, 30, 10])
    held, rest = splits.hold_out(images, 20, 3)
    assert held.class_counts == [12, 6, 2] and rest.class_counts == [48, 24, 8]
    numbers = [set(part.pixels[:, 0, 0, 0].tolist()) for part in (held, rest)]
    assert len(numbers[0]) == 20 and numbers[0] | numbers[1] == set(range(100))
    again, other = (splits.hold_out(images, 20, seed)[0].pixels for seed in (3, 4))
    assert np.array_equal(held.pixels, again) and not np.array_equal(held.pixels, other)


def test_labels_are_hidden_and_images_are_not():
    images = dataset([50, 30, 1])
    labelled, hidden = splits.few_labels(images, 8, 0)
    assert labelled.class_counts == [4, 3, 1]  # of the rarest too
    assert np.array_equal(hidden.pixels, images.pixels)
    known = hidden.labels != UNLABELLED
    assert known.sum() == 8 and torch.equal(hidden.labels[known], images.labels[known])
    assert np.array_equal(labelled.pixels, images.pixels[known.numpy()])
    assert splits.few_labels(images, None, 0) == (images, images)


@pytest.mark.parametrize(
    ("images", "held", "says"),
    [
        (replace(dataset([5, 5]), labels=None), 2, "some has no labels"),
        (replace(dataset([5, 5]), classes=["one"]), 2, "label 1 of some is out of range; with 1 classes"),
        (dataset([5, 5]), 9, "held_out 9 of 10 images in 2 classes .* use 2 to 8"),
        (dataset([5, 5]), 1, "held_out 1 of 10 images .* use 2 to 8"),
        (dataset([9, 1]), 2, "leaves no image of class class 1"),
    ],
)
def test_what_cannot_be_held_out(images, held, says):
    with pytest.raises(UserError, match=says):
        splits.hold_out(images, held, 0)
