"""Grids of images, saved as PNG, and cut into tiles again."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffkd.generation.encoding import to_image
from diffkd.io.files import new_file

COLUMNS = 8
MIN_WIDTH = 32  # smaller images are enlarged to about this width
GAP, GREY = 2, 128  # between tiles, in pixels: small images of one background could not be told apart
LAYOUT = "diffkd-tiles"  # key of the PNG's text that says how to cut it: count, width, height and gap


def grid(images: np.ndarray) -> Image.Image:
    """(N, H, W, C) uint8 -> one image of COLUMNS columns, small ones enlarged by an integer factor."""
    count, height, width, _ = images.shape
    factor = max(1, MIN_WIDTH // width)
    width, height = width * factor, height * factor
    columns, rows = COLUMNS, -(-count // COLUMNS)
    size = columns * (width + GAP) - GAP, rows * (height + GAP) - GAP
    sheet = Image.new(to_image(images[0]).mode, size, GREY if images.shape[-1] == 1 else (GREY,) * 3)
    for i in range(rows * columns):
        place = i % columns * (width + GAP), i // columns * (height + GAP)
        tile = to_image(images[i] if i < count else np.zeros_like(images[0]))
        sheet.paste(tile.resize((width, height), Image.Resampling.NEAREST), place)
    sheet.info[LAYOUT] = f"{count} of {width}x{height}, gap {GAP}"
    return sheet


def tiles(sheet: Image.Image, most: int) -> list[Image.Image]:
    """The first `most` images of a grid, enlarged as there; of one without a layout, square ones without
    a gap."""
    layout = re.fullmatch(r"(\d{1,9}) of (\d{1,9})x(\d{1,9}), gap (\d{1,9})", str(sheet.info.get(LAYOUT)))
    size = sheet.width // COLUMNS
    count, width, height, gap = map(int, layout.groups()) if layout else (most, size, size, 0)
    places = [(i % COLUMNS * (width + gap), i // COLUMNS * (height + gap)) for i in range(min(count, most))]
    return [
        sheet.crop((x, y, x + width, y + height))
        for x, y in places
        if 0 < width <= sheet.width - x and 0 < height <= sheet.height - y
    ]


def save(picture: Image.Image, path: Path) -> None:
    text = PngInfo()
    if LAYOUT in picture.info:
        text.add_text(LAYOUT, picture.info[LAYOUT])
    with new_file(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=text)
