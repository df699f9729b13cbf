"""Grids of images, saved as PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from diffkd.generation.encoding import to_image
from diffkd.io.files import new_file

COLUMNS = 8
MIN_WIDTH = 32  # smaller images are enlarged to about this width


def grid(images: np.ndarray) -> Image.Image:
    """(N, H, W, C) uint8 -> one image of COLUMNS columns, small ones enlarged by an integer factor."""
    count, height, width, channels = images.shape
    rows = -(-count // COLUMNS)
    sheet = np.zeros((rows * COLUMNS, height, width, channels), np.uint8)
    sheet[:count] = images
    sheet = sheet.reshape(rows, COLUMNS, height, width, channels).transpose(0, 2, 1, 3, 4)
    picture = to_image(sheet.reshape(rows * height, COLUMNS * width, channels))
    factor = max(1, MIN_WIDTH // width)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def save(picture: Image.Image, path: Path) -> None:
    with new_file(path) as temporary:
        picture.save(temporary, format="PNG")
