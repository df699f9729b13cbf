"""Grids: every image comes out of them again, whatever its shape and count."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from diffkd.generation import grids


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


@pytest.mark.parametrize("layout", ["9 of 0x0, gap 0", "9 of 99999x5, gap 2", "9 of 8x8", "x", ""])
def test_layouts_of_anybody(layout):
    """What a file says is not believed beyond its size."""
    sheet = Image.new("L", (64, 64))
    sheet.info[grids.LAYOUT] = layout
    assert all(tile.size == (8, 8) for tile in grids.tiles(sheet, 10))
