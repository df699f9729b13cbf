"""Makes a folder of 32x32 PNG images in colour with class subfolders: eight shapes on shaded backgrounds.

    python scripts/shapes_folder.py data/shapes-32 [--count 6000] [--seed 0]

Shape, place, size, turn and both colours differ from image to image, and the background has a slope and
waves: enough for FID to tell a model that has learned them from one that draws a part of them. The same seed
makes the same images.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from diffkd.io.files import new_folder

SIZE, FINER = 32, 3  # pixels, and how many times finer edges are drawn before they are averaged
CLASSES = ("disc", "ring", "square", "triangle", "star", "cross", "crescent", "flower")
FACTORS = 14  # numbers that an image is drawn from, beside its class


class Shapes(NamedTuple):
    """images: (N, 3, SIZE, SIZE) uint8. labels: (N,), of CLASSES in turn. factors: (N, FACTORS), each within
    [-1, 1]: the shape's place, size, sine and cosine of its turn, its colour, the background's colour, its
    slope and the strength of its waves."""

    images: np.ndarray
    labels: np.ndarray
    factors: np.ndarray


def draw(count: int, seed: int) -> Shapes:
    """Image i depends on (seed, i) alone."""
    axis = (np.arange(SIZE * FINER) + 0.5) / (SIZE * FINER) * 2 - 1
    x, y = np.meshgrid(axis, axis)
    images = np.empty((count, 3, SIZE, SIZE), np.uint8)
    labels, factors = np.arange(count) % len(CLASSES), np.empty((count, FACTORS), np.float32)
    for i, label in enumerate(labels):
        images[i], factors[i] = _drawn(int(label), np.random.default_rng([seed, i]), x, y)
    return Shapes(images, labels, factors)


def _drawn(
    label: int, rng: np.random.Generator, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    place, size, turn = rng.uniform(-0.35, 0.35, 2), rng.uniform(0.35, 0.6), rng.uniform(-np.pi, np.pi)
    colour, behind = rng.uniform(0.55, 1.0, 3), rng.uniform(0.0, 0.45, 3)
    if rng.random() < 0.5:  # dark on light as often as light on dark
        colour, behind = 1 - colour, 1 - behind
    slope, waves, phase = rng.uniform(-0.12, 0.12, 2), rng.uniform(0, 0.12), rng.uniform(0, 2 * np.pi, 2)
    cos, sin = np.cos(turn), np.sin(turn)
    u = (cos * (x - place[0]) + sin * (y - place[1])) / size
    v = (cos * (y - place[1]) - sin * (x - place[0])) / size
    inside = _inside(CLASSES[label], u, v)[..., None]
    shade = slope[0] * x + slope[1] * y + waves * np.sin(7 * x + phase[0]) * np.sin(7 * y + phase[1])
    fine = np.where(inside, colour, behind + shade[..., None]).clip(0, 1)
    image = fine.reshape(SIZE, FINER, SIZE, FINER, 3).mean((1, 3))
    factors = np.concatenate(
        [place / 0.35, [(size - 0.475) / 0.125, sin, cos], 2 * colour - 1, 2 * behind - 1, slope / 0.12,
         [waves / 0.06 - 1]]
    )  # fmt: skip
    return (image * 255).round().astype(np.uint8).transpose(2, 0, 1), factors


def _inside(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Where a shape of about radius 1 is, in its own coordinates."""
    r, angle = np.hypot(u, v), np.arctan2(v, u)

    def star(points: int, inner: float) -> np.ndarray:
        """A polygon with so many corners at 1, and as many between them at `inner`."""
        part = np.pi / points
        within = np.abs((angle + part) % (2 * part) - part)
        return r * (inner * np.sin(part - within) + np.sin(within)) < inner * np.sin(part)

    return {
        "disc": lambda: r < 0.85,
        "ring": lambda: np.abs(r - 0.72) < 0.22,
        "square": lambda: np.maximum(np.abs(u), np.abs(v)) < 0.75,
        "triangle": lambda: star(3, 0.5),
        "star": lambda: star(5, 0.42),
        "cross": lambda: (np.minimum(np.abs(u), np.abs(v)) < 0.28) & (np.maximum(np.abs(u), np.abs(v)) < 0.9),
        "crescent": lambda: (r < 0.95) & (np.hypot(u - 0.45, v) > 0.7),
        "flower": lambda: r < 0.68 + 0.28 * np.cos(6 * angle),
    }[name]()


def make(out: Path, count: int = 6000, seed: int = 0) -> int:
    """Writes out/<shape>/<index>.png, all or none; returns the count."""
    shapes = draw(count, seed)
    with new_folder(out) as folder:
        for name in CLASSES:
            (folder / name).mkdir()
        for i, (image, label) in enumerate(zip(shapes.images, shapes.labels, strict=True)):
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / CLASSES[label] / f"{i:05d}.png")
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(f"{make(given.out, given.count, given.seed)} images in {given.out}")
