"""Image files from outside: training and evaluation read odd ones the same way, and refuse bad ones."""

from __future__ import annotations

import io
import logging
import re
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from packaging.version import Version
from PIL import Image

from diffkd.data import decoding, folder, hub
from diffkd.errors import UserError
from diffkd.metrics.evaluation import image_sources

W, H = 6, 4
RAMP = np.linspace(0, 255, W * H * 3).astype(np.uint8).reshape(H, W, 3)
RNG = np.random.default_rng(3)
NOISE = RNG.integers(0, 256, (H, W, 3), dtype=np.uint8)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def read_both(tmp_path: Path, content: bytes, name: str = "x.png", channels: int = 3) -> np.ndarray:
    """(H, W, C), as both readers decode it, which must agree."""
    root = tmp_path / "read"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    (root / name).write_bytes(content)
    with decoding.open_image(root / name) as opened:
        trained = decoding.upright(opened, channels)
    if channels == 3:
        np.testing.assert_array_equal(
            np.asarray(trained), image_sources.FolderSource(root, None).read(0, 1)[0].numpy()
        )
    width, height = trained.size
    if width == height:
        spec = folder.Folder(kind="folder", path=root, size=width, channels=channels)
        pixels = spec.load().pixels[0].transpose(1, 2, 0)
        np.testing.assert_array_equal(np.asarray(trained), pixels if channels == 3 else pixels[..., 0])
    return np.asarray(trained)


def luma(rgb: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma, rounded as Pillow does."""
    r, g, b = rgb.astype(np.int64).transpose(2, 0, 1)
    return ((19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16).astype(np.uint8)


def grey3(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, 2)


ALPHA = RNG.integers(0, 256, (H, W, 1), dtype=np.uint8)
GREY = NOISE[..., 0]
BITS = RNG.integers(0, 2, (H, W)).astype(bool)
DEEP = RNG.integers(0, 65536, (H, W), dtype=np.uint16)
PALETTE = RNG.integers(0, 256, (8, 3), dtype=np.uint8)
INDEX = RNG.integers(0, 8, (H, W), dtype=np.uint8)
CMYK = RNG.integers(0, 256, (H, W, 4), dtype=np.uint8)


def palette(**info: Any) -> bytes:
    image = Image.fromarray(INDEX)
    image.putpalette(PALETTE.tobytes())
    return saved(image, "PNG", **info)


def palette_and_alpha() -> bytes:
    image = Image.frombytes("PA", (W, H), np.stack([INDEX, ALPHA[..., 0]], 2).tobytes())
    image.putpalette(PALETTE.tobytes())
    return saved(image, "TIFF")


def of_cmyk(cmyk: np.ndarray) -> np.ndarray:
    """Without a colour profile: the white left under each ink and under black."""
    c, m, y, k = cmyk.astype(np.float64).transpose(2, 0, 1)
    return np.stack([(255 - ink) * (255 - k) / 255 for ink in (c, m, y)], 2)


def deep_rgb_png(values: np.ndarray) -> bytes:
    """A 16-bit RGB PNG by hand, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


DEEP_RGB = RNG.integers(0, 65536, (H, W, 3), dtype=np.uint16)
FRAMES = [Image.fromarray(np.full((H, W, 3), c, np.uint8)) for c in (40, 90, 200)]
MANY = {"save_all": True, "append_images": FRAMES[1:]}
ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # displayed rotated by 90 degrees clockwise
EXACT = {
    "rgb": (saved(Image.fromarray(NOISE), "PNG"), NOISE),
    "rgba": (saved(Image.fromarray(np.concatenate([NOISE, ALPHA], 2)), "PNG"), NOISE),
    "transparent rgba webp": (
        saved(Image.fromarray(np.concatenate([NOISE, ALPHA], 2)), "WEBP", lossless=True, exact=True), NOISE
    ),
    "grey and alpha": (
        saved(Image.fromarray(np.concatenate([GREY[..., None], ALPHA], 2)), "PNG"), grey3(GREY)
    ),
    "grey and alpha tiff": (
        saved(Image.fromarray(np.concatenate([GREY[..., None], ALPHA], 2)), "TIFF"), grey3(GREY)
    ),
    "palette and alpha tiff": (palette_and_alpha(), PALETTE[INDEX]),
    "one colour transparent": (
        saved(Image.fromarray(NOISE), "PNG", transparency=tuple(map(int, NOISE[0, 0]))), NOISE
    ),
    "palette": (palette(), PALETTE[INDEX]),
    "palette, one transparent": (palette(transparency=3), PALETTE[INDEX]),
    "palette, all half transparent": (palette(transparency=bytes(range(0, 80, 10))), PALETTE[INDEX]),
    "grey": (saved(Image.fromarray(GREY), "PNG"), grey3(GREY)),
    "1 bit": (saved(Image.fromarray(BITS), "PNG"), grey3(np.where(BITS, 255, 0).astype(np.uint8))),
    "16-bit grey": (saved(Image.fromarray(DEEP), "PNG"), grey3(np.rint(DEEP / 257).astype(np.uint8))),
    "16-bit grey tiff": (saved(Image.fromarray(DEEP), "TIFF"), grey3(np.rint(DEEP / 257).astype(np.uint8))),
    "16-bit grey in 32": (
        saved(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), grey3(np.rint(DEEP / 257).astype(np.uint8))
    ),
    "16-bit rgb": (deep_rgb_png(DEEP_RGB), (DEEP_RGB >> 8).astype(np.uint8)),
    "first frame of an apng": (saved(FRAMES[0], "PNG", **MANY), np.asarray(FRAMES[0])),
    "first frame of a webp": (saved(FRAMES[0], "WEBP", lossless=True, **MANY), np.asarray(FRAMES[0])),
    "first page of a tiff": (saved(FRAMES[0], "TIFF", **MANY), np.asarray(FRAMES[0])),
    "gif": (saved(Image.fromarray(GREY), "GIF"), grey3(GREY)),
    "first frame of a gif": (saved(FRAMES[0], "GIF", **MANY), np.asarray(FRAMES[0])),
    "jpeg 2000": (saved(Image.fromarray(NOISE), "JPEG2000"), NOISE),
    "turned by exif": (saved(Image.fromarray(NOISE), "PNG", exif=ROTATED), np.rot90(NOISE, -1)),
    "turned tiff": (saved(Image.fromarray(NOISE), "TIFF", exif=ROTATED), np.rot90(NOISE, -1)),
    "one pixel wide": (saved(Image.fromarray(NOISE[:, :1]), "PNG"), NOISE[:, :1]),
    "one pixel": (saved(Image.fromarray(NOISE[:1, :1]), "PNG"), NOISE[:1, :1]),
    "a suffix that lies": (saved(Image.fromarray(NOISE), "BMP"), NOISE),
    "pgm of 16 bits": (
        b"P5 6 4 65535\n" + DEEP.astype(">u2").tobytes(), grey3(np.rint(DEEP / 257).astype(np.uint8))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_the_pixels_of_odd_images(tmp_path, name):
    content, expected = EXACT[name]
    np.testing.assert_array_equal(read_both(tmp_path, content), expected)
    grey = expected[..., 0] if (expected == expected[..., :1]).all() else luma(expected)
    np.testing.assert_array_equal(read_both(tmp_path, content, channels=1), grey)


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk(tmp_path, kind):
    """JPEG with inverted inks, as Adobe writes it; one colour, so that compression changes little."""
    flat = np.broadcast_to(np.array([200, 30, 90, 50], np.uint8), (16, 16, 4)).copy()
    options = {"quality": 100} if kind == "JPEG" else {}
    content = saved(Image.frombytes("CMYK", (16, 16), flat.tobytes()), kind, **options)
    assert kind == "TIFF" or b"Adobe" in content
    np.testing.assert_allclose(read_both(tmp_path, content), of_cmyk(flat), atol=3)
    content = saved(Image.frombytes("CMYK", (W, H), CMYK.tobytes()), "TIFF")
    np.testing.assert_allclose(read_both(tmp_path, content), of_cmyk(CMYK), atol=1.01)


def test_ycbcr_tiff(tmp_path):
    ycc = RNG.integers(60, 190, (H, W, 3), dtype=np.uint8)
    y, cb, cr = ycc.astype(np.float64).transpose(2, 0, 1)
    rgb = [
        y + 1.402 * (cr - 128),
        y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128),
        y + 1.772 * (cb - 128),
    ]
    content = saved(Image.frombytes("YCbCr", (W, H), ycc.tobytes()), "TIFF")
    if Version(PIL.__version__) < Version("13"):
        pytest.skip("Pillow reads no such file before 13")
    np.testing.assert_allclose(read_both(tmp_path, content), np.clip(np.stack(rgb, 2), 0, 255), atol=1.5)


def of_lab(lab: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D50) to sRGB, adapted to D65 by Bradford."""
    big, a, b = lab[..., 0] / 255 * 100, lab[..., 1], lab[..., 2]
    f = np.stack([(big + 16) / 116 + a / 500, (big + 16) / 116, (big + 16) / 116 - b / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1, 0.8249]
    linear = (
        xyz
        @ np.array(
            [
                [3.1338561, -1.6168667, -0.4906146],
                [-0.9787684, 1.9161415, 0.0334540],
                [0.0719453, -0.2289914, 1.4052427],
            ]
        ).T
    )
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_lab_tiff(tmp_path):
    signed = np.stack([RNG.integers(90, 190, (H, W)), *RNG.integers(-12, 12, (2, H, W))], 2).astype(
        np.float64
    )
    stored = np.stack([signed[..., 0], signed[..., 1] % 256, signed[..., 2] % 256], 2).astype(np.uint8)
    content = saved(Image.frombytes("LAB", (W, H), stored.tobytes()), "TIFF")
    again = np.asarray(Image.open(io.BytesIO(content)))
    signed = np.stack([again[..., 0], again[..., 1].view(np.int8), again[..., 2].view(np.int8)], 2).astype(
        float
    )
    found = read_both(tmp_path, content)
    np.testing.assert_allclose(found, of_lab(signed), atol=3)
    np.testing.assert_array_equal(read_both(tmp_path, content, channels=1), luma(found))


BOMB = b"P5 12000 8000 255\n"  # a header that promises 96 million pixels
REFUSED = {
    "zero bytes": (b"", "not a complete PNG"),
    "truncated gif": (saved(Image.fromarray(GREY), "GIF")[:-12], "truncated|image file"),
    "tga": (saved(Image.fromarray(NOISE), "TGA"), "not a complete PNG"),  # it has no signature
    "postscript": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "not a complete PNG",
    ),
    "truncated png": (EXACT["rgb"][0][:-30], "truncated|image file|broken"),
    "truncated jpeg": (saved(Image.fromarray(np.tile(NOISE, (30, 30, 1))), "JPEG")[:2000], "truncated"),
    "float tiff": (saved(Image.fromarray(RAMP[..., 0].astype(np.float32)), "TIFF"), "floating-point"),
    "32-bit tiff": (
        saved(Image.fromarray(np.full((H, W), 1 << 20, np.int32)), "TIFF"),
        "more than 16 bits",
    ),
    "negative tiff": (saved(Image.fromarray(np.full((H, W), -1, np.int32)), "TIFF"), "more than 16 bits"),
    "bomb": (BOMB, "12000x8000 pixels are more than PIL.Image.MAX_IMAGE_PIXELS"),
    "larger bomb": (b"P5 30000 30000 255\n", "decompression bomb"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_images_that_are_refused(tmp_path, name, caplog, recwarn):
    content, why = REFUSED[name]
    root = tmp_path / "images"
    root.mkdir()
    for i in range(3):
        (root / f"x{i}.png").write_bytes(content)
    with warnings.catch_warnings():
        warnings.resetwarnings()  # as in the command, with the filter of diffkd.data
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, append=True)
        with pytest.raises(UserError, match=rf"x\d.png cannot be read \(.*({why})"):
            image_sources.FolderSource(root, None).read(0, 1)
        with pytest.raises(UserError, match="3 of 3 images in"), caplog.at_level(logging.WARNING):
            folder.Folder(kind="folder", path=root, size=2, upscale=True).load()
    assert len(caplog.records) == 3
    assert all(re.search(why, record.getMessage()) for record in caplog.records)
    assert not [w for w in recwarn if "bomb" in str(w.message)]


def test_decompression_bombs_print_one_line_each(tmp_path, image_folder):
    """In a process of its own, with the warning filters that Python starts with."""
    root = image_folder(tmp_path, count=4)
    for i in range(4):
        (root / f"bomb{i}.pgm").write_bytes(BOMB)
    script = (
        "import diffkd.data.folder as d, logging; logging.basicConfig(format='%(message)s')\n"
        f"try: d.Folder(kind='folder', path={str(root)!r}, size=8).load()\n"
        "except ValueError as error: print(error)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert ran.stdout.startswith("4 of 8 images")
    assert [line.startswith("unreadable image skipped") for line in ran.stderr.splitlines()] == [True] * 4


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_users_own_pixel_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ValueError, match="6x4 pixels are more than"):
        read_both(tmp_path, EXACT["rgb"][0])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    np.testing.assert_array_equal(read_both(tmp_path, EXACT["rgb"][0]), NOISE)


@pytest.mark.parametrize("shape", [(64, 1), (1, 64), (1, 1)])
def test_thin_images_are_fitted(tmp_path, shape):
    """With a short side of one pixel, the crop is the middle pixel, enlarged to one colour."""
    pixels = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    root = tmp_path / "thin"
    root.mkdir()
    Image.fromarray(pixels).save(root / "x.png")
    trained = (
        folder.Folder(kind="folder", path=root, size=8, upscale=True).load().pixels[0].transpose(1, 2, 0)
    )
    np.testing.assert_array_equal(trained, image_sources.FolderSource(root, 8).read(0, 1)[0].numpy())
    middle = pixels.reshape(-1, 3)
    assert trained.shape == (8, 8, 3)
    if len(middle) == 1:
        np.testing.assert_array_equal(trained, np.broadcast_to(middle[0], (8, 8, 3)))
    with pytest.raises(UserError, match="smaller than size"):
        folder.Folder(kind="folder", path=root, size=8).load()


def test_dataset_rows_are_decoded_like_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    other = {"bytes": REFUSED["tga"][0], "path": None}
    rows = [{"bytes": EXACT[name][0], "path": "../../evil.png"} for name in ("rgb", "rgba", "16-bit rgb")]
    table = datasets.Dataset.from_dict(
        {"image": [*rows, other]}, features=datasets.Features(image=datasets.Image())
    )
    table.save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match="1 of 4 images"):
        hub.HubDataset(kind="datasets", path=str(tmp_path / "set"), size=4).load()
    table.select(range(3)).save_to_disk(tmp_path / "good")
    images = hub.HubDataset(kind="datasets", path=str(tmp_path / "good"), size=4).load()
    for found, (_, expected) in zip(
        images.pixels, [EXACT[n] for n in ("rgb", "rgba", "16-bit rgb")], strict=True
    ):
        np.testing.assert_array_equal(found.transpose(1, 2, 0), expected[:, 1:5])
