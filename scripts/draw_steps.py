"""Draws docs/steps.svg, the picture of docs/concepts.md: a teacher's steps, and those of its students.

python scripts/draw_steps.py docs/steps.svg

Each tile is the state x_t = cos(t pi / 2) x0 + sin(t pi / 2) eps of one small image and one noise, at the
times of each grid.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np

IMAGE = (
    "..####..",
    ".#....#.",
    "......#.",
    "...###..",
    "......#.",
    "......#.",
    ".#....#.",
    "..####..",
)
SHADES = 8
TILE, GAP, LEFT, TOP, ROW = 44, 36, 150, 58, 92  # pixels
STEPS = (8, 4, 2, 1)
INK, QUIET, PAPER, MARK = "#1f2430", "#5b6472", "#f6f7fb", "#3f51b5"


def states() -> list[np.ndarray]:
    """x_t at t = 1, 7/8, ..., 0: (8, 8) each, in [-1, 1] where it is an image."""
    x0 = np.array([[1.0 if mark == "#" else -1.0 for mark in row] for row in IMAGE])
    eps = np.random.default_rng(3).standard_normal(x0.shape)
    angles = [t / STEPS[0] * math.pi / 2 for t in range(STEPS[0], -1, -1)]
    return [math.cos(angle) * x0 + math.sin(angle) * eps for angle in angles]


def tile(state: np.ndarray, x: int, y: int) -> str:
    """One image, a path for each shade: dark where the state is high."""
    shades = np.clip((1 - state) / 2 * SHADES, 0, SHADES - 1).astype(int)
    paths = []
    for shade in range(SHADES - 1):  # the lightest is the ground
        places = np.argwhere(shades == shade)
        cells = "".join(f"M{column} {row}h1v1h-1z" for row, column in places)
        grey = round(35 + 220 * shade / (SHADES - 1))
        paths += [f'<path fill="rgb({grey},{grey},{grey})" d="{cells}"/>'] if cells else []
    ground = '<rect width="8" height="8" fill="#fff"/>'
    frame = f'<rect x="{x}" y="{y}" width="{TILE}" height="{TILE}" fill="none" stroke="{QUIET}"/>'
    inner = f'<g transform="translate({x} {y}) scale({TILE / 8})" shape-rendering="crispEdges">'
    return f"{inner}{ground}{''.join(paths)}</g>{frame}"


def row(steps: int, y: int, drawn: list[np.ndarray]) -> list[str]:
    """The states that a model of so many steps stops at, and its steps between them."""
    stride = STEPS[0] // steps
    places = [(i, LEFT + i * (TILE + GAP)) for i in range(0, STEPS[0] + 1, stride)]
    who = "teacher" if steps == STEPS[0] else "student"
    parts = [
        f'<text x="20" y="{y + 18}" font-weight="600">{who}</text>',
        f'<text x="20" y="{y + 38}" fill="{QUIET}">{steps} step{"s" * (steps > 1)}</text>',
    ]
    for (_, x), (_, end) in zip(places[:-1], places[1:], strict=True):
        middle = y + TILE // 2
        parts.append(f'<path d="M{x + TILE + 4} {middle}H{end - 10}" stroke="{MARK}" stroke-width="2.5"/>')
        parts.append(f'<path d="M{end - 12} {middle - 5}l8 5l-8 5z" fill="{MARK}"/>')
    return parts + [tile(drawn[i], x, y) for i, x in places]


def picture() -> str:
    """The whole SVG. It has a ground of its own, to be read on light and dark pages."""
    drawn = states()
    width = LEFT + (STEPS[0] + 1) * TILE + STEPS[0] * GAP + 20
    height = TOP + len(STEPS) * ROW + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="15" fill="{INK}">',
        "<title>A teacher of eight steps and its students of four, two and one</title>",
        f'<rect width="{width}" height="{height}" rx="10" fill="{PAPER}"/>',
        f'<text x="{LEFT}" y="36" fill="{QUIET}">t = 1: noise</text>',
        f'<text x="{width - 20}" y="36" fill="{QUIET}" text-anchor="end">t = 0: the image</text>',
    ]
    for number, (before, steps) in enumerate(zip((None, *STEPS), STEPS, strict=False)):
        y = TOP + number * ROW
        if before is not None:  # where a student's step lands, its teacher's did
            stride = STEPS[0] // steps
            for i in range(0, STEPS[0] + 1, stride):
                x = LEFT + i * (TILE + GAP) + TILE // 2
                line = f"M{x} {y - ROW + TILE + 4}V{y - 4}"
                parts.append(f'<path d="{line}" stroke="{QUIET}" stroke-dasharray="3 4"/>')
        parts += row(steps, y, drawn)
    said = "One step of each student learns to land where two of the model above it do."
    parts.append(f'<text x="{LEFT}" y="{height - 18}" fill="{QUIET}">{said}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.parse_args().out.write_text(picture(), encoding="utf-8")
