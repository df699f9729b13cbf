"""Image files of every format and mode, beside the pixels they were made from."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.data.helpers import RNG, folder, noise


def mode(path) -> str:
    with Image.open(path) as image:
        return image.mode


def test_grey_of_colour_is_luma_and_colour_of_grey_is_grey(tmp_path):
    colour, grey = noise(8, 8, 3), noise(8, 8)
    Image.fromarray(colour).save(tmp_path / "a.png")
    Image.fromarray(grey).save(tmp_path / "b.png")
    luma = colour @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    found = folder(tmp_path)
    assert np.abs(found.pixels[0, 0] - luma).max() <= 1
    assert np.array_equal(found.pixels[1, 0], grey)
    assert np.array_equal(folder(tmp_path, channels=3).pixels[1], np.stack([grey] * 3))


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg", ".jpeg", ".PNG", ".Jpg"])
def test_formats(tmp_path, suffix):
    """A smooth image, of which JPEG loses little."""
    ramp = np.linspace(40, 200, 16)[:, None] + np.linspace(0, 40, 16)
    pixels = np.stack([ramp, ramp[::-1], np.full((16, 16), 90)], -1).round().astype(np.uint8)
    lossy = suffix.lower().startswith(".j")
    Image.fromarray(pixels).save(
        tmp_path / f"a{suffix}", **({"quality": 98} if lossy else {"lossless": True})
    )
    found = folder(tmp_path, size=16, channels=3).pixels[0].astype(int)
    assert np.abs(found - pixels.transpose(2, 0, 1)).max() <= (8 if lossy else 0)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.T),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).T),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_exif_turns_the_image_upright(tmp_path, orientation, upright):
    pixels = noise(16, 16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(folder(tmp_path, size=16).pixels[0, 0], upright(pixels))


def test_exif_of_a_jpeg(tmp_path):
    """A landscape image that EXIF turns into a portrait: its centre, with rows running down."""
    pixels = np.repeat(np.linspace(0, 255, 48).astype(np.uint8)[None], 16, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=100)
    found = folder(tmp_path, size=16).pixels[0, 0].astype(int)
    assert np.abs(found - pixels[0, 16:32, None].astype(int)).max() <= 3


def test_16_bit_grey_keeps_its_range(tmp_path):
    eight = noise(8, 8)
    eight[0, :2] = 0, 255
    Image.fromarray(eight.astype(np.uint16) * 257).save(tmp_path / "a.png")
    assert mode(tmp_path / "a.png").startswith("I")
    assert np.array_equal(folder(tmp_path).pixels[0, 0], eight)
    assert np.array_equal(folder(tmp_path, channels=3).pixels[0], np.stack([eight] * 3))


def test_alpha_is_dropped(tmp_path):
    rgba, la = noise(8, 8, 4), noise(8, 8, 2)
    Image.fromarray(rgba, "RGBA").save(tmp_path / "a.png")
    Image.fromarray(la, "LA").save(tmp_path / "b.png")
    found = folder(tmp_path, channels=3).pixels
    assert np.array_equal(found[0], rgba[..., :3].transpose(2, 0, 1))
    assert np.array_equal(found[1], np.stack([la[..., 0]] * 3))
    assert np.array_equal(folder(tmp_path).pixels[1, 0], la[..., 0])


@pytest.mark.parametrize("transparency", [None, 3, bytes([255, 128, 0, 7])])
def test_palettes(tmp_path, transparency):
    palette, index = noise(4, 3), RNG.integers(0, 4, (8, 8), dtype=np.uint8)
    image = Image.fromarray(index, "L")
    image.putpalette(palette.tobytes())
    image.save(tmp_path / "a.png", **({} if transparency is None else {"transparency": transparency}))
    assert mode(tmp_path / "a.png") == "P"
    assert np.array_equal(folder(tmp_path, channels=3).pixels[0], palette[index].transpose(2, 0, 1))
    luma = palette[index] @ np.array([0.299, 0.587, 0.114])
    assert np.abs(folder(tmp_path).pixels[0, 0] - luma).max() <= 1


def test_black_and_white(tmp_path):
    bits = RNG.integers(0, 2, (8, 8)).astype(bool)
    Image.fromarray(bits).save(tmp_path / "a.png")
    assert np.array_equal(folder(tmp_path).pixels[0, 0], bits * np.uint8(255))


def test_cmyk_jpeg(tmp_path):
    """A single colour: R = 255 (1 - C)(1 - K), and so on."""
    cmyk = np.array([40, 120, 200, 60], np.uint8)
    Image.fromarray(np.tile(cmyk, (16, 16, 1)), "CMYK").save(tmp_path / "a.jpg", quality=100)
    expected = 255 * (1 - cmyk[:3] / 255) * (1 - cmyk[3] / 255)
    found = folder(tmp_path, size=16, channels=3).pixels[0]
    assert np.abs(found - expected[:, None, None]).max() <= 3
