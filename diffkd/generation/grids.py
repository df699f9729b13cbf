"""Grids of images, saved as PNG, and cut into tiles again."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffkd.generation.encoding import to_image
from diffkd.generation.small_print import printed
from diffkd.io.files import new_file
from diffkd.io.text import from_json

COLUMNS = 8
MIN_WIDTH, PRINTED_WIDTH = 32, 128  # smaller images are enlarged to about this, or this if text is under them
GAP, GREY = 2, 128  # between tiles, in pixels: small images of one background could not be told apart
LAYOUT = "diffkd-tiles"  # key of the PNG's text that says how to cut it
PROMPTS = "prompts"  # key of its text with the prompt of each tile, as JSON
LONGEST = 1000  # characters of a prompt that are kept there


def grid(images: np.ndarray, prompts: Sequence[str] | None = None) -> Image.Image:
    """(N, H, W, C) uint8 -> one image of COLUMNS columns, small ones enlarged by an integer factor.

    prompts: image i is of the one at i, modulo their number. Several are written under their images, with a
    column for each if there are no more than COLUMNS.
    """
    count, height, width, channels = images.shape
    several = prompts is not None and len(set(prompts)) > 1
    factor = max(1, (PRINTED_WIDTH if several else MIN_WIDTH) // width)
    width, height = width * factor, height * factor
    shown = [prompts[i % len(prompts)] for i in range(count)] if prompts else []
    texts = printed(shown, width) if several else []
    below = texts[0].height if texts else 0
    columns = len(prompts) if prompts and several and len(prompts) <= COLUMNS else COLUMNS
    rows = -(-count // columns)
    size = columns * (width + GAP) - GAP, rows * (height + below + GAP) - GAP
    sheet = Image.new(to_image(images[0]).mode, size, GREY if channels == 1 else (GREY,) * 3)
    for i in range(rows * columns):
        x, y = i % columns * (width + GAP), i // columns * (height + below + GAP)
        tile = to_image(images[i] if i < count else np.zeros_like(images[0]))
        sheet.paste(tile.resize((width, height), Image.Resampling.NEAREST), (x, y))
        if i < len(texts):
            sheet.paste(texts[i], (x, y + height))
    sheet.info[LAYOUT] = f"{count} of {width}x{height}, gap {GAP}"
    if texts:
        sheet.info[LAYOUT] += f", columns {columns}, below {below}"
    if shown:
        sheet.info[PROMPTS] = json.dumps([prompt[:LONGEST] for prompt in shown])
    return sheet


def tiles(sheet: Image.Image, most: int) -> list[Image.Image]:
    """The first `most` images of a grid, enlarged as there; of one without a layout, square ones without
    a gap."""
    number = r"(\d{1,9})"
    layout = re.fullmatch(
        rf"{number} of {number}x{number}, gap {number}(?:, columns {number}, below {number})?",
        str(sheet.info.get(LAYOUT)),
    )
    size = sheet.width // COLUMNS
    found = [int(text or 0) for text in layout.groups()] if layout else [most, size, size, 0, 0, 0]
    count, width, height, gap, columns, below = found
    columns = columns or COLUMNS
    places = [
        (i % columns * (width + gap), i // columns * (height + below + gap)) for i in range(min(count, most))
    ]
    return [
        sheet.crop((x, y, x + width, y + height))
        for x, y in places
        if 0 < width <= sheet.width - x and 0 < height <= sheet.height - y
    ]


def prompts_of(sheet: Image.Image, most: int) -> list[str]:
    """Of the first `most` images of a grid; none where it does not say them."""
    try:
        found = from_json(str(sheet.info.get(PROMPTS)))
    except ValueError:
        return []
    usable = isinstance(found, list) and all(isinstance(prompt, str) for prompt in found)
    return found[:most] if usable else []


def save(picture: Image.Image, path: Path) -> None:
    text = PngInfo()
    for key in (LAYOUT, PROMPTS):
        if key in picture.info:
            text.add_text(key, picture.info[key])
    with new_file(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=text)
