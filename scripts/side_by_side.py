"""One picture of a run: the same noise drawn by its teacher and by each of its students, with their FIDs.

    python scripts/side_by_side.py runs/digits-best docs/quickstart.png

Reads samples/*.png and metrics.json of the run (extra `report`). Of a text-to-image run the prompts are below
their columns.
"""

import argparse
import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from diffkd.generation import grids

TILES = 10  # one of each class, as labels come in turn
INK, TEACHER, STUDENT = "black", "#6b7787", "#0c7d74"


def tiles(path: Path) -> list[np.ndarray]:
    """The first tiles of a grid of samples."""
    with Image.open(path) as grid:
        return [np.asarray(tile) for tile in grids.tiles(grid, TILES)]


def prompts(run: Path) -> list[str]:
    """Of the first tiles; none of a run without prompts."""
    with Image.open(next(iter((run / "samples").glob("*.png")))) as grid:
        return grids.prompts_of(grid, TILES)


def rows(run: Path) -> list[tuple[str, str, list[np.ndarray]]]:
    """(role, title, tiles): the teacher from many steps to few, then the students."""
    measured = {(r["model"], r["steps"]): r for r in json.loads((run / "metrics.json").read_text())}
    found = []
    for path in (run / "samples").glob("*.png"):
        teacher, steps, method = re.fullmatch(r"(teacher-)?(\d+)-steps(?:-(.+))?", path.stem).groups()
        role, name = ("teacher", "teacher") if teacher else ("student", path.stem)
        title = f"{role}, {steps} step{'s' * (steps != '1')}" + (f", {method}" if method else "")
        if record := measured.get((name, int(steps))):
            title += f"   FID {record['fid']:.{2 if record['fid'] < 100 else 0}f}"
        found.append((role == "student", -int(steps), name, role, title, tiles(path)))
    return [row[3:] for row in sorted(found, key=lambda row: row[:3])]


def strips(
    out: Path, drawn: Sequence[tuple[str, str, Sequence[np.ndarray]]], left: float, below: Sequence[str] = ()
) -> None:
    """A picture of rows: a title, its colour, TILES images of (H, W) or (H, W, 3). left: the titles' share of
    the width. below: what is written under the columns. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    texts = [textwrap.fill(text, 11) for text in below]
    tall = len(drawn) + 0.17 * max((text.count("\n") + 2 for text in texts), default=0)  # in rows
    figure = Figure(figsize=(7.2, 0.5 * tall), dpi=110)
    bottom = 0.005 + 1 - len(drawn) / tall
    grid = figure.add_gridspec(
        len(drawn), TILES, left=left, right=0.995, top=0.995, bottom=bottom, wspace=0.06, hspace=0.1
    )
    for y, (title, colour, images) in enumerate(drawn):
        for x, image in enumerate(images):
            axes = figure.add_subplot(grid[y, x])
            axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_axis_off()
        figure.text(
            left - 0.01, 1 - (y + 0.5) / tall, title, ha="right", va="center", fontsize=9, color=colour
        )
    for x, text in enumerate(texts):
        place = left + (x + 0.5) * (0.995 - left) / TILES
        figure.text(place, bottom - 0.03 / tall, text, ha="center", va="top", fontsize=5.5, color=INK)
    figure.savefig(out, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("out", type=Path, help="the PNG to write")
    given = parser.parse_args()
    drawn = [
        (title, TEACHER if role == "teacher" else STUDENT, images) for role, title, images in rows(given.run)
    ]
    strips(given.out, drawn, left=0.34, below=prompts(given.run))
    print(f"{given.out}: {given.out.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
