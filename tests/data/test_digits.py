"""The digits dataset beside scikit-learn's."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits

from diffkd.data.digits import Digits


def test_digits_are_scikit_learns():
    images, source = Digits(kind="digits").load(), load_digits()
    assert images.pixels.shape == (1797, 1, 8, 8) and images.pixels.dtype == np.uint8
    levels = [
        0,
        16,
        32,
        48,
        64,
        80,
        96,
        112,
        128,
        143,
        159,
        175,
        191,
        207,
        223,
        239,
        255,
    ]  # 255 / 16 * 0, 1, ..., 16
    assert np.array_equal(images.pixels[:, 0], np.array(levels, np.uint8)[source.images.astype(int)])
    assert images.labels.dtype == torch.int64 and np.array_equal(images.labels.numpy(), source.target)
    assert images.classes == list("0123456789") and images.num_classes == 10
    assert images.shape == (1, 8, 8) and len(images) == 1797 and not images.flip
