"""Ways to 299x299, each beside a second implementation: loops, formulas, Pillow."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffkd.errors import UserError
from diffkd.metrics.features.resize import OLD, RESIZES, prepare, renamed, resize

SIZES = [(8, 8, 21), (32, 32, 299), (11, 17, 13), (40, 23, 12), (23, 64, 64), (1, 5, 4), (50, 50, 1)]


def pictures(height: int, width: int, channels: int = 3, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)


def loops(picture: np.ndarray, size: int, half: float) -> np.ndarray:
    """Two neighbours a side, (H, W) -> (size, size). half: 0 for TensorFlow 1, 0.5 for half-pixel centres."""
    height, width = picture.shape
    out = np.empty((size, size))
    for i in range(size):
        y = max(0.0, (i + half) * height / size - half)
        top = math.floor(y)
        bottom = min(top + 1, height - 1)
        for j in range(size):
            x = max(0.0, (j + half) * width / size - half)
            left = math.floor(x)
            right = min(left + 1, width - 1)
            above = picture[top, left] + (picture[top, right] - picture[top, left]) * (x - left)
            below = picture[bottom, left] + (picture[bottom, right] - picture[bottom, left]) * (x - left)
            out[i, j] = above + (below - above) * (y - top)
    return out


def pillow(picture: np.ndarray, size: int, way: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(picture.astype(np.float32)).resize((size, size), way))


def reference(picture: np.ndarray, size: int, how: str) -> np.ndarray:
    if how == "clean":
        return pillow(picture, size, Image.Resampling.BICUBIC).clip(0, 255)
    if how == "torchmetrics":
        return pillow(picture, size, Image.Resampling.BILINEAR)
    return loops(picture.astype(np.float64), size, 0.0 if how == "tf1" else 0.5)


@pytest.mark.parametrize("how", RESIZES)
@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_beside_a_second_implementation(how, height, width, size):
    """In double precision as near as the other comes (Pillow's results are float32). In float32 torch rounds
    the coordinates too, our own code does not."""
    images = pictures(height, width, count=1 if size == 299 else 2)
    single, double = resize(images, size, how), resize(images, size, how, dtype=torch.float64)
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    for n, picture in enumerate(images.numpy()):
        for c, channel in enumerate(picture):
            expected = reference(channel, size, how)
            near = 4e-5 if how in ("torchmetrics", "clean") else 1e-11
            np.testing.assert_allclose(double[n, c], expected, rtol=0, atol=near)
            np.testing.assert_allclose(single[n, c], expected, rtol=0, atol=6e-5 if how == "tf1" else 1e-3)


def test_tf1_of_two_pixels_by_hand():
    """Coordinates 0, 2/3, 4/3: the last lies beyond the last pixel, which is repeated."""
    ours = resize(torch.tensor([[[[0.0, 90.0], [0.0, 90.0]]]]), 3, "tf1")
    assert torch.allclose(ours, torch.tensor([0.0, 60.0, 90.0]).expand(1, 1, 3, 3))


def test_bicubic_overshoots_and_is_clipped():
    edge = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    edge[..., 4:] = 255
    raw = pillow(edge[0, 0].numpy(), 32, Image.Resampling.BICUBIC)
    assert raw.min() < -5 and raw.max() > 260
    ours = resize(edge, 32, "clean")
    assert ours.min() == 0 and ours.max() == 255


@pytest.mark.parametrize("how", RESIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_equal_size_changes_nothing(how, channels):
    images = pictures(24, 24, channels)
    assert torch.equal(resize(images, 24, how), images.float())


@pytest.mark.parametrize("how", RESIZES)
def test_constant_pictures_stay_constant(how):
    for value in (0, 7, 255):
        images = torch.full((1, 3, 13, 40), value, dtype=torch.uint8)
        for size in (5, 29, 64):
            assert (resize(images, size, how) - value).abs().max() < 1e-4


@pytest.mark.parametrize("how", RESIZES)
def test_grey_is_a_channel_like_others(how):
    images = pictures(12, 19)
    whole = resize(images, 30, how)
    for c in range(3):
        assert torch.allclose(resize(images[:, c : c + 1], 30, how), whole[:, c : c + 1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("how", RESIZES)
def test_floats_are_not_rounded_and_the_input_is_left_alone(how):
    images = pictures(10, 10).float() / 3
    before = images.clone()
    ours = resize(images, 10, how)
    assert torch.equal(ours, before)
    ours.add_(1)  # a caller may scale in place
    assert torch.equal(images, before)


def test_the_ways_differ():
    """Else a test above could pass with one way in the place of another."""
    images = pictures(40, 40)
    results = [resize(images, 15, how) for how in RESIZES]
    for i, one in enumerate(results):
        for other in results[:i]:
            assert (one - other).abs().mean() > 1


def test_an_unknown_way():
    with pytest.raises(
        UserError, match="resize 'lanczos' is unknown; use one of tf1, clean, pytorch-fid, torchmetrics$"
    ):
        resize(pictures(4, 4), 8, "lanczos")


# normalised as the tool does it


@pytest.mark.parametrize("how", RESIZES)
def test_a_mode_is_resize_and_normalisation(how):
    """On images of the right size nothing is resized, and the modes differ nevertheless."""
    images = pictures(9, 9)
    values = images.double()
    expected = 2 * values / 255 - 1 if how == "pytorch-fid" else (values - 128) / 128
    assert torch.allclose(prepare(images, 9, how, dtype=torch.float64), expected, rtol=1e-14, atol=1e-14)
    resized = resize(images, 20, how, dtype=torch.float64)
    expected = 2 * resized / 255 - 1 if how == "pytorch-fid" else (resized - 128) / 128
    assert torch.allclose(prepare(images, 20, how, dtype=torch.float64), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("old", "same"), [("bilinear", "pytorch-fid"), ("antialias", "torchmetrics")])
def test_names_of_older_versions_mean_what_they_were(old, same):
    """bilinear resized as pytorch-fid, but normalised otherwise: no mode of today is the same."""
    images = pictures(9, 9)
    assert torch.equal(resize(images, 20, old), resize(images, 20, same))
    before = (resize(images, 20, old) - 128) / 128
    assert torch.equal(prepare(images, 20, old), before)
    assert torch.equal(prepare(images, 20, same), before) == (OLD[old] == same)


@pytest.mark.parametrize(
    ("given", "now"),
    [
        ({"name": "inception", "resize": "antialias"}, "torchmetrics"),
        ({"name": "inception", "resize": "bilinear"}, "bilinear"),
        ({"name": "inception", "resize": "tf1"}, "tf1"),
        ({"name": "somebody's", "resize": "antialias"}, "antialias"),
        ({"name": "inception", "resize": ["antialias"]}, ["antialias"]),
        ({"name": "inception"}, None),
    ],
)
def test_descriptions_of_older_versions(given, now):
    renamed(given)
    assert given.get("resize") == now
    renamed(None)
