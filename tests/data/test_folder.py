"""Folders of images: order, classes, broken files."""

from __future__ import annotations

import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from diffkd.errors import UserError
from tests.data.helpers import folder, noise, truncate


def test_class_folders_are_labels_in_sorted_order(tmp_path, image_folder):
    root = image_folder(tmp_path, classes=["b", "a", "10", "2"], count=3)
    (root / "empty").mkdir()
    (root / "a" / "notes.txt").write_text("no image")
    (root / "2" / "deeper").mkdir()
    (root / "2" / "002.png").rename(root / "2" / "deeper" / "002.PNG")
    images = folder(root)
    assert images.classes == ["10", "2", "a", "b"] and images.num_classes == 4
    assert images.labels.tolist() == [n for n in range(4) for _ in range(3)]
    for n, name in enumerate(images.classes):
        files = {f.read_bytes() for f in (root / name).rglob("*.[pP][nN][gG]")}
        expected = {np.asarray(Image.open(io.BytesIO(f))).tobytes() for f in files}
        assert {images.pixels[i, 0].tobytes() for i in np.flatnonzero(images.labels.numpy() == n)} == expected


def test_labelled_false_leaves_the_classes_out(tmp_path, image_folder):
    root = image_folder(tmp_path, classes=["a", "b"])
    images = folder(root, labelled=False)
    assert images.labels is None and images.num_classes is None and images.classes == []
    assert np.array_equal(images.pixels, folder(root).pixels)


def test_loose_images_are_in_the_order_of_their_names(tmp_path):
    arrays = {name: noise(8, 8) for name in ("b.png", "a.png", "c.webp", "A.png")}
    for name, pixels in arrays.items():
        Image.fromarray(pixels).convert("RGB").save(tmp_path / name, lossless=True)
    images = folder(tmp_path)
    assert images.labels is None
    assert np.array_equal(images.pixels[:, 0], [arrays[name] for name in sorted(arrays)])


def test_images_beside_class_folders_are_refused(tmp_path, image_folder):
    root = image_folder(tmp_path, classes=["a"])
    Image.fromarray(noise(8, 8)).save(root / "loose.png")
    with pytest.raises(UserError, match=r"both images and class folders \(a.*labelled: false"):
        folder(root)
    assert folder(root, labelled=False).labels is None and len(folder(root, labelled=False)) == 5
    (root / "a" / "000.txt").write_text("what it shows")  # and captions say what is in them
    assert [*folder(root).captions] == ["what it shows", "", "", "", ""] and folder(root).labels is None


def test_labels_stay_with_their_images_after_a_broken_one(tmp_path, image_folder, caplog):
    root = image_folder(tmp_path, classes=["a", "b"], count=60)
    whole = folder(root)
    truncate(root / "a" / "007.png")
    with caplog.at_level(logging.WARNING, "diffkd"):
        images = folder(root)
    kept = [i for i in range(120) if i != 7]
    assert np.array_equal(images.pixels, whole.pixels[kept])
    assert torch.equal(images.labels, whole.labels[kept])
    assert [str(root / "a" / "007.png") in r.message for r in caplog.records] == [True]


def test_at_most_one_image_in_a_hundred_may_be_broken(tmp_path, image_folder, caplog):
    root = image_folder(tmp_path, count=100)
    truncate(root / "010.png")
    assert len(folder(root)) == 99
    (root / "020.png").write_bytes(b"")
    caplog.clear()
    with pytest.raises(UserError, match=r"2 of 100 images .* cannot be read"):
        folder(root)
    assert "010.png" in caplog.text and "020.png" in caplog.text
