"""Pictures of shapes: what a caption says is what is drawn, by pixels alone."""

from __future__ import annotations

import numpy as np
import pytest

from diffkd.data import shapes
from diffkd.data.shapes import COLOURS, KINDS, PLACES, RELATIONS, Scene, Shape, Shapes


def test_an_example_depends_on_its_seed_and_index_alone():
    few, others = Shapes(kind="shapes", count=20).load(), Shapes(kind="shapes", count=10, start=10).load()
    assert few.pixels.shape == (20, 3, 32, 32) and few.captions[10:] == others.captions
    assert np.array_equal(few.pixels[10:], others.pixels)
    again = Shapes(kind="shapes", count=20, seed=1).load()
    assert again.captions != few.captions and few.digest() != again.digest()


def test_everything_is_drawn_about_as_often():
    found = [shapes.example(0, i)[2] for i in range(3000)]
    for every, of in ((KINDS, "kind"), (COLOURS, "colour")):
        counts = [sum(getattr(one.shapes[0], of) == value for one in found) for value in every]
        assert min(counts) > 0.8 * 3000 / len(counts)
    two = [one for one in found if len(one.shapes) == 2]
    assert abs(len(two) / 3000 - shapes.TWO) < 0.04 and {one.place for one in two} == set(RELATIONS)
    assert {one.place for one in found if len(one.shapes) == 1} == set(PLACES)


def test_a_caption_is_read_as_what_it_says():
    """Whatever its wording: sizes that it leaves out, and the place of a single shape, are None."""
    sized = placed = 0
    for index in range(2000):
        _, text, made = shapes.example(0, index)
        read = shapes.read_caption(text)
        assert [(s.kind, s.colour) for s in read.shapes] == [(s.kind, s.colour) for s in made.shapes], text
        assert all(r.size in (None, m.size) for r, m in zip(read.shapes, made.shapes, strict=True)), text
        assert read.place == made.place or (read.place is None and len(made.shapes) == 1), text
        sized += read.shapes[0].size is not None
        placed += read.place is not None
    assert 0.8 < sized / 2000 < 0.9 and 0.8 < placed / 2000 < 0.95
    assert shapes.read_caption("A  small red ring ABOVE a large blue square") == Scene(
        (Shape("ring", "red", "small"), Shape("square", "blue", "large")), "above"
    )
    assert shapes.read_caption("a cat") is None and shapes.read_caption("a red ring and a blue star") is None


def mask(pixels, colour):
    """Where a picture has this colour: (H, W) bool."""
    away = np.abs(pixels.transpose(1, 2, 0).astype(int) - np.array(COLOURS[colour]))
    return away.max(-1) <= shapes.SHADES


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_lies_where_it_is_said_and_is_as_large(kind):
    rng = np.random.default_rng(0)
    areas = {}
    for size in shapes.SIZES:
        for place, ((x, y), _) in PLACES.items():
            pixels = shapes.picture(Scene((Shape(kind, "blue", size),), place), rng, 64)
            rows, columns = np.nonzero(mask(pixels, "blue"))
            assert abs(columns.mean() / 64 - x) < 0.06 and abs(rows.mean() / 64 - y) < 0.06
            areas.setdefault(size, []).append(len(rows))
    assert min(areas["large"]) > 1.8 * max(areas["small"]) > 0


@pytest.mark.parametrize("relation", RELATIONS)
def test_two_shapes_lie_as_the_caption_says(relation):
    rng = np.random.default_rng(0)
    two = Scene((Shape("circle", "red", "large"), Shape("square", "blue", "large")), relation)
    pixels = shapes.picture(two, rng, 64)
    (y1, x1), (y2, x2) = (np.argwhere(mask(pixels, colour)).mean(0) for colour in ("red", "blue"))
    says = {"above": y1 < y2, "below": y1 > y2, "left of": x1 < x2, "right of": x1 > x2}
    assert says[relation]


def test_kinds_differ_from_each_other():
    """By their areas and their holes, of the same size and place."""
    pictures = [
        shapes.picture(Scene((Shape(kind, "black", "large"),), "middle"), np.random.default_rng(0), 64)
        for kind in KINDS
    ]
    for i, one in enumerate(pictures):
        for other in pictures[i + 1 :]:
            assert (mask(one, "black") ^ mask(other, "black")).mean() > 0.01
