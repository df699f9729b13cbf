"""Captioned pictures of coloured shapes, drawn from a seed: text to image without anything to download."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw
from pydantic import Field

from diffkd.data.images import Images
from diffkd.io.config import Strict

KINDS = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = {
    "red": (220, 40, 40), "orange": (245, 140, 30), "yellow": (235, 210, 40), "green": (40, 160, 70),
    "blue": (45, 90, 220), "purple": (140, 60, 190), "brown": (120, 75, 40), "black": (30, 30, 30),
}  # fmt: skip
SIZES = {"small": 0.12, "large": 0.22}  # radius, in sides of the picture
PLACES = {  # of one shape: its centre, in sides of the picture, and how captions say it
    "middle": ((0.5, 0.5), ("in the middle", "in the centre")),
    "top": ((0.5, 0.26), ("at the top",)),
    "bottom": ((0.5, 0.74), ("at the bottom",)),
    "left": ((0.26, 0.5), ("on the left",)),
    "right": ((0.74, 0.5), ("on the right",)),
}
RELATIONS = {  # of two shapes: the centre of the first, whose mirror image is the second's
    "above": (0.5, 0.26),
    "below": (0.5, 0.74),
    "left of": (0.26, 0.5),
    "right of": (0.74, 0.5),
}
SAID = {"left of": ("to the left of", "left of"), "right of": ("to the right of", "right of")}
JITTER, SHADES, PAPER = 0.03, 10, (225, 255)  # of places, of colours, and the shades of the background
OVERSAMPLED = 4
TWO, UNSIZED, UNPLACED = 0.6, 0.15, 0.3  # shares: of two shapes, of captions without a size or a place
WIDEST = 32  # pixels of a side
HELD_OUT = 1_000_000  # index of the first picture that nothing is trained on


@dataclass(frozen=True)
class Shape:
    """One shape; a size of None is one that a caption does not say."""

    kind: str
    colour: str
    size: str | None


@dataclass(frozen=True)
class Scene:
    """What a picture shows. place: of the first shape: one of PLACES where it is alone, of RELATIONS where
    there are two; None for one that a caption does not say."""

    shapes: tuple[Shape, ...]
    place: str | None


def scene(rng: np.random.Generator) -> Scene:
    """A random scene, in which everything is said."""
    two = rng.random() < TWO
    shapes = tuple(
        Shape(str(rng.choice(KINDS)), str(rng.choice([*COLOURS])), str(rng.choice([*SIZES])))
        for _ in range(1 + two)
    )
    return Scene(shapes, str(rng.choice([*(RELATIONS if two else PLACES)])))


def caption(of: Scene, rng: np.random.Generator) -> str:
    """One of several wordings, which may leave out sizes and the place of a single shape."""
    sized = rng.random() >= UNSIZED
    names = [" ".join(filter(None, (one.size if sized else None, one.colour, one.kind))) for one in of.shapes]
    named = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
    place = of.place or ""
    if len(named) == 2:
        relation = str(rng.choice(SAID.get(place, (place,))))
        return f"{named[0]} {relation} {named[1]}"
    if rng.random() < UNPLACED:
        return str(rng.choice([named[0], f"a picture of {named[0]}"]))
    words = str(rng.choice(PLACES[place][1]))
    return str(rng.choice([f"{named[0]} {words}", f"{words} is {named[0]}"]))


_NAME = re.compile(rf"(?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(KINDS)})")


def read_caption(text: str) -> Scene | None:
    """What a caption of this kind asks for; None for another text."""
    text = " ".join(text.lower().split())
    found = list(_NAME.finditer(text))
    if not 1 <= len(found) <= 2:
        return None
    shapes = tuple(Shape(kind, colour, size) for size, colour, kind in (match.groups() for match in found))
    if len(found) == 2:
        between = text[found[0].end() : found[1].start()]
        place = next((relation for relation in RELATIONS if relation in between), None)
        return None if place is None else Scene(shapes, place)
    places = ((place, words) for place, (_, said) in PLACES.items() for words in said)
    return Scene(shapes, next((place for place, words in places if words in text), None))


def picture(of: Scene, rng: np.random.Generator, side: int = WIDEST) -> np.ndarray:
    """(3, side, side) uint8."""
    big = side * OVERSAMPLED
    paper = int(rng.integers(PAPER[0], PAPER[1] + 1))
    image = Image.new("RGB", (big, big), (paper,) * 3)
    x, y = PLACES[of.place or "middle"][0] if len(of.shapes) == 1 else RELATIONS[of.place or "above"]
    for number, shape in enumerate(of.shapes):
        at = (x, y) if number == 0 else (1 - x, 1 - y)
        centre = [big * (c + JITTER * float(rng.uniform(-1, 1))) for c in at]
        shade = rng.integers(-SHADES, SHADES + 1, 3)
        colour = tuple(int(c) for c in np.clip(np.array(COLOURS[shape.colour]) + shade, 0, 255))
        _draw(ImageDraw.Draw(image), shape.kind, centre, big * SIZES[shape.size or "large"], colour, paper)
    small = image.resize((side, side), Image.Resampling.BOX)
    return np.asarray(small).transpose(2, 0, 1)


def _draw(
    draw: ImageDraw.ImageDraw,
    kind: str,
    centre: list[float],
    radius: float,
    colour: tuple[int, ...],
    paper: int,
) -> None:
    x, y = centre

    def around(r: float) -> list[float]:
        return [x - r, y - r, x + r, y + r]

    def corners(count: int, radii: tuple[float, ...]) -> list[tuple[float, float]]:
        angles = [-math.pi / 2 + 2 * math.pi * k / count for k in range(count)]
        lengths = [radius * radii[k % len(radii)] for k in range(count)]
        return [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(lengths, angles, strict=True)]

    if kind == "circle":
        draw.ellipse(around(radius), fill=colour)
    elif kind == "square":
        draw.rectangle(around(radius * 0.88), fill=colour)
    elif kind == "triangle":
        draw.polygon(corners(3, (1.15,)), fill=colour)
    elif kind == "star":
        draw.polygon(corners(10, (1.2, 0.5)), fill=colour)
    elif kind == "ring":
        draw.ellipse(around(radius), fill=colour)
        draw.ellipse(around(radius * 0.55), fill=(paper,) * 3)
    else:
        arm = radius * 0.36
        draw.rectangle([x - arm, y - radius, x + arm, y + radius], fill=colour)
        draw.rectangle([x - radius, y - arm, x + radius, y + arm], fill=colour)


def example(seed: int, index: int, side: int = WIDEST) -> tuple[np.ndarray, str, Scene]:
    """Picture (3, side, side) uint8, caption and scene of an index; they depend on (seed, index) alone."""
    rng = np.random.default_rng([seed, index])
    made = scene(rng)
    return picture(made, rng, side), caption(made, rng), made


class Shapes(Strict):
    """Pictures of one or two coloured shapes with captions, drawn from the seed as they are loaded."""

    kind: Literal["shapes"]
    count: int = Field(20_000, ge=1, le=10_000_000, description="how many")
    start: int = Field(0, ge=0, description="index of the first: others are held out")
    seed: int = Field(0, ge=0, description="of the pictures; image i is of (seed, i) alone")
    side: int = Field(WIDEST, ge=16, le=256, description="height and width")

    def load(self) -> Images:
        pixels = np.empty((self.count, 3, self.side, self.side), np.uint8)
        captions = []
        for number in range(self.count):
            pixels[number], text, _ = example(self.seed, self.start + number, self.side)
            captions.append(text)
        return Images("shapes", pixels, captions=captions)
