"""Batches of images: their values, their randomness, their mirror images."""

from __future__ import annotations

import numpy as np
import torch

from diffkd.data.images import Images


def test_a_batch_is_pixels_over_127_5_minus_one():
    pixels = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8)
    images = Images("all", pixels, torch.arange(4), list("abcd"))
    x0, cond = images.batch(64, torch.Generator().manual_seed(0))
    labels = cond["class_labels"]
    assert x0.shape == (64, 1, 8, 8) and x0.dtype == torch.float32 and len(set(labels.tolist())) == 4
    expected = pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)
    assert np.array_equal(x0.numpy(), expected[labels.numpy()])
    assert x0.min() == -1 and x0.max() == 1


def numbered(count: int, *, flip: bool = False) -> Images:
    """Images that differ from their mirror images; image i has label i."""
    pixels = np.random.default_rng(3).integers(0, 256, (count, 3, 4, 4), dtype=np.uint8)
    return Images("numbered", pixels, torch.arange(count), [str(i) for i in range(count)], flip)


def test_a_batch_depends_on_its_generator_alone():
    images = numbered(50, flip=True)
    first = images.batch(32, torch.Generator().manual_seed(5))
    torch.manual_seed(123)
    np.random.seed(123)
    images.batch(7, torch.Generator().manual_seed(6))
    again = numbered(50, flip=True).batch(32, torch.Generator().manual_seed(5))
    other = images.batch(32, torch.Generator().manual_seed(7))
    one, same, another = (batch[1]["class_labels"] for batch in (first, again, other))
    assert torch.equal(first[0], again[0]) and torch.equal(one, same)
    assert not torch.equal(one, another)


def test_every_image_is_equally_likely():
    rngs = [torch.Generator().manual_seed(seed) for seed in range(10)]
    labels = torch.cat([numbered(10).batch(1000, rng)[1]["class_labels"] for rng in rngs])
    chi2 = float(((torch.bincount(labels, minlength=10) - 1000.0) ** 2 / 1000).sum())
    assert chi2 < 28  # 9 degrees of freedom: 0.1%


def test_half_of_the_images_are_mirrored_exactly():
    images, straight = numbered(50, flip=True), torch.from_numpy(numbered(50).pixels).float() / 127.5 - 1
    x0, cond = images.batch(4000, torch.Generator().manual_seed(0))
    labels = cond["class_labels"]
    mirrored = (x0 == straight[labels].flip(-1)).flatten(1).all(1)
    as_it_was = (x0 == straight[labels]).flatten(1).all(1)
    assert bool((mirrored ^ as_it_was).all())
    assert abs(mirrored.float().mean() - 0.5) < 0.03  # 3.8 standard deviations
    share = torch.zeros(50).index_add_(0, labels, mirrored.float()) / torch.bincount(labels, minlength=50)
    assert bool(((share > 0.2) & (share < 0.8)).all())  # of each image, not of some


def test_no_flips_unless_configured():
    images = numbered(50)
    x0, cond = images.batch(500, torch.Generator().manual_seed(0))
    assert torch.equal(x0, (torch.from_numpy(images.pixels).float() / 127.5 - 1)[cond["class_labels"]])


def test_a_batch_may_be_written_to(tmp_path):
    images = numbered(4)
    before = images.pixels.copy()
    images.batch(4, torch.Generator().manual_seed(0))[0].zero_()
    images.uint8(torch.tensor([0, 1])).zero_()
    assert np.array_equal(images.pixels, before)
