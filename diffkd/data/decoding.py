"""Decoding image files with Pillow: which formats are opened, and how pixels are converted to 8 bits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features

# Formats are recognised by content, whatever a file is called. No others: Pillow supports formats that run
# other programs (PostScript) or read other files, and some that have no signature (TGA), so that any file
# could be one.
_SUFFIXES = {
    "PNG": (".png", ".apng"), "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "WEBP": (".webp",),
    "BMP": (".bmp",), "PPM": (".ppm", ".pgm", ".pbm", ".pnm"), "TIFF": (".tif", ".tiff"), "GIF": (".gif",),
    "JPEG2000": (".jp2", ".j2k", ".jpx"), "AVIF": (".avif",), "QOI": (".qoi",),
}  # fmt: skip
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations whose height is the width
_LIBRARIES = {"JPEG2000": "jpg_2000", "AVIF": "avif"}  # without which Pillow may have been built
Image.init()  # loads its plugins
FORMATS = tuple(
    name
    for name in _SUFFIXES
    if name in Image.OPEN and (name not in _LIBRARIES or features.check(_LIBRARIES[name]))
)
SUFFIXES = tuple(suffix for name in FORMATS for suffix in _SUFFIXES[name])
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
    _check_limit(opened)
    opened.load()
    return to_8_bit(ImageOps.exif_transpose(opened), channels)


def plain(opened: Image.Image) -> Image.Image:
    """RGB as Pillow converts to it and nothing else, as tools for FID do: not turned, 16-bit values cut at
    255.

    Raises ValueError for more pixels than Pillow's limit.
    """
    _check_limit(opened)
    return opened.convert("RGB")


def _check_limit(opened: Image.Image) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and opened.width * opened.height > limit:
        raise ValueError(
            f"{opened.width}x{opened.height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS, {limit}"
        )


def upright_size(opened: Image.Image) -> tuple[int, int]:
    """Height and width of an image once it is turned upright, from its head alone: EXIF data behind the
    pixels of a PNG is not seen, and Pillow turns a TIFF itself."""
    head = Image.new("1", (1, 1))  # reads what Pillow turns images by, EXIF data or XMP, and no pixels
    head.info = opened.info
    own = ExifTags.Base.Orientation in getattr(opened, "tag_v2", {})  # of a TIFF, which it goes by already
    turned = not own and head.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
    return (opened.width, opened.height) if turned else (opened.height, opened.width)


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


def fitted(image: Image.Image, height: int, width: int) -> Image.Image:
    """height x width: resized (bicubic, antialiased) until it covers that, the centre cropped."""
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
