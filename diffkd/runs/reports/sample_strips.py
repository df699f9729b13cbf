"""Strips of samples: the first images of every model, side by side."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from diffkd.data.decoding import open_image
from diffkd.generation import grids
from diffkd.runs.reports import page
from diffkd.runs.reports.run_files import Measurements

TILES = 10  # of a strip: one of each class if there are ten in turn, and legible on a phone
TILE_SIZE = 128  # the most pixels of a strip's tile, so that a page of many models stays small


def section(folder: Path, measured: Measurements) -> str:
    """A strip for each grid in the folder: the teacher before the students, many steps before few."""
    strips = []
    students = {r.get("model"): r for r in (*measured.students.values(), *measured.earlier)}
    for path in folder.glob("*.png"):
        if not (tiles := _tiles(path)):
            continue
        role = "teacher" if path.stem.startswith("teacher") else "student"
        title, count = path.stem, 0
        if found := re.search(r"(\d+)-steps(?:-(.+))?", path.stem):
            count, method = int(found[1]), found[2]
            title = ", ".join([role, page.steps(count), *([method] if method else [])])
        record = students.get(path.stem) if role == "student" else measured.teacher.get(count)
        strips.append((role == "student", -(count or math.inf), path.stem, role, title, record, tiles))
    strips.sort(key=lambda strip: strip[:3])
    width = min((len(tiles) for *_, tiles in strips), default=0)
    rows = ""
    for *_, role, title, record, tiles in strips:
        fid = f"<span>FID {page.number(record['fid'])}</span>" if record else ""
        caption = f"<figcaption><b>{page.escaped(title)}</b>{fid}</figcaption>"
        rows += f'<figure class="strip {role}">{caption}{_strip(tiles[:width], title)}</figure>'
    why = "Every column starts from one noise and one label; each row shows what one model makes of them."
    head = f"<h2>The same noise</h2><p>{why}</p>" if len(strips) > 1 else "<h2>Samples</h2>"
    return f'<section>{head}<div class="card">{rows}</div></section>' if rows else ""


def _tiles(path: Path) -> list[Image.Image]:
    """The first tiles of a grid; none of a picture that cannot be read."""
    try:
        with open_image(path) as file:
            return grids.tiles(file if file.mode in ("L", "RGB") else file.convert("RGB"), TILES)
    except Exception:  # Pillow raises many kinds
        return []


def _strip(tiles: Sequence[Image.Image], title: str) -> str:
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
