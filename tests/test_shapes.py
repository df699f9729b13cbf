"""scripts/shapes_folder.py: the same images for the same seed, which are what their numbers say."""

import sys
from pathlib import Path

import numpy as np
import pytest

from diffkd.data.folder import Folder

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from shapes_folder import CLASSES, FACTORS, SIZE, draw, make  # noqa: E402


def test_an_image_depends_on_its_number_and_the_seed_alone():
    few, many, others = draw(3, 5), draw(9, 5), draw(3, 6)
    assert (many.images[:3] == few.images).all() and (many.factors[:3] == few.factors).all()
    assert all((a != b).any() for a, b in zip(few.images, others.images, strict=True))
    assert many.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0]
    assert many.factors.shape == (9, FACTORS) and abs(many.factors).max() <= 1


def test_a_disc_has_the_place_size_and_colour_of_its_numbers():
    found = draw(10 * len(CLASSES), 0)
    for image, factors in zip(found.images[:: len(CLASSES)], found.factors[:: len(CLASSES)], strict=True):
        centre, radius = 0.35 * factors[:2], 0.85 * (0.475 + 0.125 * factors[2])
        colour = ((factors[5:8] + 1) / 2 * 255).round()
        inside = (abs(image - colour[:, None, None]) <= 1).all(0)
        x, y = np.meshgrid(*[(np.arange(SIZE) + 0.5) / SIZE * 2 - 1] * 2)
        whole = np.hypot(x - centre[0], y - centre[1])
        assert inside[whole < radius - 0.05].all() and not inside[whole > radius + 0.05].any()


def test_the_folder_is_read_as_classes(tmp_path):
    assert make(tmp_path / "shapes", 16) == 16
    images = Folder(kind="folder", path=tmp_path / "shapes", size=SIZE, channels=3).load()
    assert images.classes == sorted(CLASSES) and images.class_counts == pytest.approx([2] * len(CLASSES))
    drawn = draw(16, 0)
    for i in range(16):
        name = CLASSES[drawn.labels[i]]
        place = 2 * images.classes.index(name) + i // len(CLASSES)
        assert (images.pixels[place] == drawn.images[i]).all()
