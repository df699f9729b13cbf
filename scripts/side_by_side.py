"""One picture of a run: the same noise drawn by its teacher and by each of its students, with their FIDs.

    python scripts/side_by_side.py runs/digits-best docs/quickstart.png

Reads samples/*.png and metrics.json of the run (extra `report`).
"""

import argparse
import json
import re
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


def rows(run: Path) -> list[tuple[str, str, list[np.ndarray]]]:
    """(role, title, tiles): the teacher from many steps to few, then the students."""
    fids = {(r["model"], r["steps"]): r["fid"] for r in json.loads((run / "metrics.json").read_text())}
    found = []
    for path in (run / "samples").glob("*.png"):
        teacher, steps, method = re.fullmatch(r"(teacher-)?(\d+)-steps(?:-(.+))?", path.stem).groups()
        role, name = ("teacher", "teacher") if teacher else ("student", path.stem)
        title = f"{role}, {steps} step{'s' * (steps != '1')}" + (f", {method}" if method else "")
        if (name, int(steps)) in fids:
            title += f"   FID {fids[name, int(steps)]:.2f}"
        found.append((role == "student", -int(steps), name, role, title, tiles(path)))
    return [row[3:] for row in sorted(found, key=lambda row: row[:3])]


def strips(out: Path, drawn: Sequence[tuple[str, str, Sequence[np.ndarray]]], left: float) -> None:
    """A picture of rows: a title, its colour, TILES images of (H, W) or (H, W, 3). left: the titles' share of
    the width. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 0.5 * len(drawn)), dpi=110)
    grid = figure.add_gridspec(
        len(drawn), TILES, left=left, right=0.995, top=0.995, bottom=0.005, wspace=0.06, hspace=0.1
    )
    for y, (title, colour, images) in enumerate(drawn):
        for x, image in enumerate(images):
            axes = figure.add_subplot(grid[y, x])
            axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_axis_off()
        figure.text(
            left - 0.01, 1 - (y + 0.5) / len(drawn), title, ha="right", va="center", fontsize=9, color=colour
        )
    figure.savefig(out, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("out", type=Path, help="the PNG to write")
    given = parser.parse_args()
    drawn = [
        (title, TEACHER if role == "teacher" else STUDENT, images) for role, title, images in rows(given.run)
    ]
    strips(given.out, drawn, left=0.34)
    print(f"{given.out}: {given.out.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
