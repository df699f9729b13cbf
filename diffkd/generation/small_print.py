"""Text under the images of a grid: a prompt in a few short lines."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

LINES, LONGEST = 4, 400  # of a prompt, and characters of it that are looked at
SMALLEST, SHARE = 11, 24  # pixels of the font, and font sizes in the width of an image
MARGIN, DOTS = 3, "..."


def printed(texts: Sequence[str], width: int) -> list[Image.Image]:
    """Black on white, (height, width) of one height for all; a text of more than LINES is cut.

    Pillow's own font has ASCII alone: letters lose their accents, and what has none becomes a question mark.
    """
    size = max(SMALLEST, width // SHARE)
    font = ImageFont.load_default(size)
    step = round(1.25 * size)
    blocks = [_lines(_ascii(text[:LONGEST]), font, width - 2 * MARGIN) for text in texts]
    height = step * max(map(len, blocks)) + 2 * MARGIN
    made = []
    for lines in blocks:
        image = Image.new("L", (width, height), "white")
        draw = ImageDraw.Draw(image)
        for number, line in enumerate(lines):
            draw.text((MARGIN, MARGIN + number * step), line, "black", font)
        made.append(image)
    return made


def _ascii(text: str) -> str:
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return plain.encode("ascii", "replace").decode("ascii")


def _lines(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """At most LINES, as long as fit into that many pixels."""
    lines: list[str] = []
    for columns in range(round(width / font.getlength("n")), len(DOTS), -1):
        lines = textwrap.wrap(text, columns, max_lines=LINES, placeholder=DOTS)
        if all(font.getlength(line) <= width for line in lines):
            break
    return lines
