"""Strips of samples: the first images of every model, side by side, over the prompts that they are of."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from diffkd.data.decoding import open_image
from diffkd.generation import grids
from diffkd.runs.reports import page, run_files
from diffkd.runs.reports.run_files import Measurements, Record

TILES = 10  # of a strip: one of each class if there are ten in turn, and legible on a phone
PROMPTED = 8  # of one with prompts, which need room
TILE_SIZE = 128  # the most pixels of a strip's tile, so that a page of many models stays small
LONGEST = 120  # characters of a prompt under its column; the rest is shown when one points at it


class Strip(NamedTuple):
    """The pictures of one model. steps: 0 where they are not known."""

    role: str
    steps: int
    stem: str
    title: str
    record: Record | None
    tiles: list[Image.Image]
    prompts: list[str]


def section(folder: Path, measured: Measurements) -> str:
    """A strip for each grid in the folder: the teacher before the students, many steps before few."""
    strips = [strip for path in folder.glob("*.png") if (strip := _read(path, measured))]
    strips.sort(key=lambda one: (one.role == "student", -(one.steps or math.inf), one.stem))
    prompted = any(strip.prompts for strip in strips)
    width = min([PROMPTED if prompted else TILES, *(len(strip.tiles) for strip in strips)])
    rows = ""
    for prompts, same in groupby(strips, lambda strip: strip.prompts[:width]):
        for strip in same:
            numbers = {"FID": page.number(strip.record["fid"])} if strip.record else {}
            numbers |= run_files.of_prompts(strip.record)
            said = "".join(f"<span>{title} {number}</span>" for title, number in numbers.items())
            caption = f"<figcaption><b>{page.escaped(strip.title)}</b>{said}</figcaption>"
            picture = _picture(strip.tiles[:width], strip.title)
            rows += f'<figure class="strip {strip.role}">{caption}{picture}</figure>'
        rows += _under(prompts)
    given = "prompt" if prompted else "label"
    why = f"Every column starts from one noise and one {given}; each row shows what one model makes of them."
    head = f"<h2>The same noise</h2><p>{why}</p>" if len(strips) > 1 else "<h2>Samples</h2>"
    return f'<section>{head}<div class="card">{rows}</div></section>' if rows else ""


def _read(path: Path, measured: Measurements) -> Strip | None:
    """None for a picture that cannot be read."""
    try:
        with open_image(path) as file:
            prompts = grids.prompts_of(file, TILES)
            tiles = grids.tiles(file if file.mode in ("L", "RGB") else file.convert("RGB"), TILES)
    except Exception:  # Pillow raises many kinds
        return None
    if not tiles:
        return None
    role = "teacher" if path.stem.startswith("teacher") else "student"
    title, count = path.stem, 0
    if found := re.search(r"(\d+)-steps(?:-(.+))?", path.stem):
        count, method = int(found[1]), found[2]
        title = ", ".join([role, page.steps(count), *([method] if method else [])])
    students = {r.get("model"): r for r in (*measured.students.values(), *measured.earlier)}
    record = students.get(path.stem) if role == "student" else measured.teacher.get(count)
    return Strip(role, count, path.stem, title, record, tiles, prompts)


def _under(prompts: Sequence[str]) -> str:
    """What the columns above are of."""
    if not prompts:
        return ""
    items = ""
    for prompt in prompts:
        short = prompt if len(prompt) <= LONGEST else f"{prompt[:LONGEST].rstrip()} …"
        items += f'<li title="{page.escaped(prompt)}">{page.escaped(short)}</li>'
    columns = f'<ol class="prompts" style="--tiles:{len(prompts)}">{items}</ol>'
    return f'<div class="strip">{columns}</div>'


def _picture(tiles: Sequence[Image.Image], title: str) -> str:
    width, height = tiles[0].size
    strip = Image.new(tiles[0].mode, (width * len(tiles), height))
    for i, tile in enumerate(tiles):
        strip.paste(tile, (i * width, 0))
    if width > TILE_SIZE:
        size = TILE_SIZE * len(tiles), max(round(height * TILE_SIZE / width), 1)
        strip = strip.resize(size, Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    strip.save(stream, format="PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
    rendering = "pixelated" if width <= 64 else "auto"  # larger ones are shown reduced, where it would alias
    style = f"--tiles:{len(tiles)};image-rendering:{rendering}"
    shape = f'width="{strip.width}" height="{strip.height}" style="{style}"'
    return f'<img alt="{page.escaped(title)}" {shape} src="{source}">'
