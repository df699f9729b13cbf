"""Resizing and cropping beside a float64 reference; where the pixels are kept."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffkd.data import resized
from diffkd.errors import UserError
from tests.data.helpers import bicubic, folder, hub, noise, truncate


@pytest.mark.parametrize("shape", [(24, 72), (72, 24), (20, 31), (9, 8), (16, 16)])
def test_the_short_side_is_fitted_and_the_centre_kept(tmp_path, shape):
    """An image with white and black margins, so that a crop off the centre shows."""
    height, width = shape
    pixels = noise(height, width)
    border = (max(shape) - min(shape)) // 2
    along = pixels if width > height else pixels.T
    along[:, :border], along[:, along.shape[1] - border :] = 255, 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.abs(folder(tmp_path).pixels[0, 0] - bicubic(pixels, 8)).max() < 1.2  # Pillow rounds twice


def test_an_image_of_the_right_size_is_unchanged(tmp_path):
    pixels = noise(8, 8, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(folder(tmp_path, channels=3).pixels[0], pixels.transpose(2, 0, 1))


def test_upscaling_only_if_configured(tmp_path):
    pixels = noise(5, 5)
    Image.fromarray(pixels).save(tmp_path / "small.png")
    with pytest.raises(UserError, match=r"small\.png is 5x5, smaller than size 8; .*upscale"):
        folder(tmp_path)
    assert np.abs(folder(tmp_path, upscale=True).pixels[0, 0] - bicubic(pixels, 8)).max() < 1.2


@pytest.mark.parametrize("size", [(8, 7), (7, 80)])
def test_the_short_side_is_what_counts(tmp_path, size):
    Image.fromarray(noise(*size)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=f"{size[1]}x{size[0]}"):
        folder(tmp_path)


def test_flip_comes_from_the_config(tmp_path, image_folder):
    root = image_folder(tmp_path)
    assert folder(root, flip=True).flip and not folder(root).flip
    saved = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(noise(8, 8))]}, datasets.Features(image=datasets.Image())
    )
    saved.save_to_disk(tmp_path / "saved")
    assert hub(tmp_path / "saved", flip=True).flip and not hub(tmp_path / "saved").flip


def test_pixels_beyond_the_limit_are_mapped_from_a_file(tmp_path, image_folder, monkeypatch):
    root = image_folder(tmp_path, classes=["a", "b"], count=60)
    truncate(root / "a" / "001.png")
    in_memory = folder(root)
    assert not isinstance(in_memory.pixels, np.memmap)
    monkeypatch.setattr(resized, "MAX_IN_MEMORY", 100)
    mapped = folder(root)
    assert isinstance(mapped.pixels, np.memmap) and len(mapped) == 119
    assert np.array_equal(mapped.pixels, in_memory.pixels)
    one, other = (i.batch(16, torch.Generator().manual_seed(1)) for i in (mapped, in_memory))
    assert torch.equal(one[0], other[0]) and one[1].keys() == other[1].keys()
    assert torch.equal(mapped.uint8(slice(100, 300)), torch.from_numpy(in_memory.pixels[100:]))
