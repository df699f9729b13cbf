"""Grids: every image comes out of them again, whatever its shape and count."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from diffkd.generation import grids
from diffkd.generation.small_print import LINES, printed


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64])
@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 8, 3), (5, 9, 3), (40, 20, 1), (20, 40, 3), (1, 1, 1)])
def test_images_are_cut_out_as_they_were(tmp_path, count, shape):
    images = np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)
    path = tmp_path / "grid.png"
    grids.save(grids.grid(images), path)
    with Image.open(path) as sheet:
        tiles = [np.asarray(tile) for tile in grids.tiles(sheet, 100)]
    factor = max(1, 32 // shape[1])
    assert len(tiles) == count
    for tile, image in zip(tiles, images, strict=True):
        expected = image.repeat(factor, 0).repeat(factor, 1)
        np.testing.assert_array_equal(tile, expected[..., 0] if shape[-1] == 1 else expected)


def test_images_of_one_background_can_be_told_apart(tmp_path):
    for value in (0, 255):
        sheet = np.asarray(grids.grid(np.full((16, 8, 8, 1), value, np.uint8)))
        assert (np.abs(sheet[:, 32:34].astype(int) - value) > 100).all()
        assert (np.abs(sheet[32:34].astype(int) - value) > 100).all()


@pytest.mark.parametrize("count", [1, 6, 20])
@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3), (150, 140, 3)])
@pytest.mark.parametrize("number", [2, 3, 8, 9])
def test_prompts_stand_under_their_images(tmp_path, count, shape, number):
    """A column for each, if they are no more than the columns of any grid; the images come out as before."""
    images = np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)
    prompts = [f"prompt {i} café" for i in range(number)]
    path = tmp_path / "grid.png"
    grids.save(grids.grid(images, prompts), path)
    factor = max(1, 128 // shape[1])
    columns = number if number <= 8 else 8
    with Image.open(path) as sheet:
        assert sheet.width == columns * (shape[1] * factor + 2) - 2
        tiles = [np.asarray(tile) for tile in grids.tiles(sheet, 100)]
        assert grids.prompts_of(sheet, 100) == [prompts[i % number] for i in range(count)]
        assert len(grids.prompts_of(sheet, 4)) == min(4, count)
        pixels = np.asarray(sheet.convert("L"))
    assert len(tiles) == count
    for tile, image in zip(tiles, images, strict=True):
        expected = image.repeat(factor, 0).repeat(factor, 1)
        np.testing.assert_array_equal(tile, expected[..., 0] if shape[-1] == 1 else expected)
    texts = printed([prompts[i % number] for i in range(count)], shape[1] * factor)
    under = pixels[shape[0] * factor :][: texts[0].height, : texts[0].width]
    np.testing.assert_array_equal(under, np.asarray(texts[0]))


def test_one_prompt_for_all_is_kept_and_not_written(tmp_path):
    images = np.zeros((3, 32, 32, 3), np.uint8)
    grids.save(grids.grid(images, ["a star"]), tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.size == grids.grid(images).size and grids.prompts_of(sheet, 9) == ["a star"] * 3


@pytest.mark.parametrize("width", [65, 128, 512])
def test_small_print_fits(width):
    """Long prompts are cut, letters lose what the font does not have, and all are of one height."""
    long, loud, short, bare, foreign = printed(
        ["very " * 1000, "W" * 300, "a café", "a cafe", "红色的圆"], width
    )
    marks = [np.asarray(image) < 128 for image in (long, loud, short)]
    assert len({image.size for image in (long, loud, short, bare, foreign)}) == 1
    for mark in marks:
        assert mark.any() and not mark[:, -1].any()
    lines = [int((np.diff(mark.any(1).astype(int)) == 1).sum()) for mark in marks]
    assert (lines[0], lines[2]) == (LINES, 1)
    assert short.tobytes() == bare.tobytes()
    assert foreign.tobytes() == printed(["????", "very " * 1000], width)[0].tobytes()


@pytest.mark.parametrize("text", ["x", "{}", "[1]", "[" * 100_000, '{"a": 1}', None])
def test_prompts_of_anybody(text):
    sheet = Image.new("L", (64, 64))
    if text is not None:
        sheet.info[grids.PROMPTS] = text
    assert grids.prompts_of(sheet, 10) == []


@pytest.mark.parametrize(
    "layout",
    ["9 of 0x0, gap 0", "9 of 8x8, gap 0, columns 0, below 0", "9 of 99999x5, gap 2", "9 of 8x8", "x", ""],
)
def test_layouts_of_anybody(layout):
    """What a file says is not believed beyond its size."""
    sheet = Image.new("L", (64, 64))
    sheet.info[grids.LAYOUT] = layout
    assert all(tile.size == (8, 8) for tile in grids.tiles(sheet, 10))
