"""Decoding image files with Pillow: which formats are opened, and how pixels are converted to 8 bits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
# Formats are recognised by content, whatever a file is called. No others: Pillow supports formats that run
# other programs (PostScript) or read other files.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF")
# Decoding threads would print these over each other. `upright` refuses what the first one warns of; the
# others are about metadata that is not used. Appended, so that a user's own filters take precedence.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, append=True)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.", append=True)


def open_image(file: Path | IO[bytes]) -> Image.Image:
    """Opens an image without reading its pixels. Raises what Pillow does, and OSError for other formats."""
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise OSError(f"it is not a complete {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file") from error


def upright(opened: Image.Image, channels: int) -> Image.Image:
    """The first frame of an image, rotated as its EXIF orientation says, as 8-bit grey (1 channel) or RGB
    (3).

    Raises ValueError for more pixels than Pillow's limit, and for the modes that `to_8_bit` refuses.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and opened.width * opened.height > limit:
        raise ValueError(
            f"{opened.width}x{opened.height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS, {limit}"
        )
    opened.load()
    return to_8_bit(ImageOps.exif_transpose(opened), channels)


def to_8_bit(image: Image.Image, channels: int) -> Image.Image:
    """An image of any mode as 8-bit grey (1 channel) or RGB (3), by Pillow's `convert`: alpha is dropped.

    16-bit grey is scaled to 8 bits. Raises ValueError for floating-point and 32-bit pixels, since the file
    does not say which value is white.
    """
    if image.mode.startswith("I"):  # 16-bit grey; convert() would clip it to white
        values = np.asarray(image).astype(np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels have more than 16 bits, and which value is white is not known")
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, and which value is white is not known")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "LAB":
        image = image.convert("RGB")  # Pillow cannot convert LAB to grey directly
    return image.convert("L" if channels == 1 else "RGB")


def fitted(image: Image.Image, size: int) -> Image.Image:
    """size x size: the short side resized (bicubic, antialiased), the centre cropped."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def image_files(folder: Path) -> Iterator[Path]:
    """The image files in a folder and its subfolders, in no particular order."""
    return (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
