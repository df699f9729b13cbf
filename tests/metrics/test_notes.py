"""What a reader of a number must know: one line each, in the record and on the screen, and none otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from diffkd.metrics.evaluation import records
from diffkd.metrics.evaluation.notes import notes
from diffkd.metrics.evaluation.reference import Reference
from diffkd.runs.stats import stats


@pytest.fixture
def here(tmp_path, monkeypatch, image_folder) -> Path:
    image_folder(tmp_path, name="images", count=80)
    image_folder(tmp_path, name="real", count=90, seed=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def noted(cli, here) -> Callable[..., list[str]]:
    """noted(target, reference, ...) -> the notes of the record, each of which the command shows as a line."""

    def run(*args: object) -> list[str]:
        code, out, err = cli("evaluate", *args, "--features", "digits", "--out", "r.json")
        assert code == 0, err
        notes = json.loads(Path("r.json").read_text())["notes"]
        shown = out.splitlines()
        assert all(shown.count(note) == 1 for note in notes)
        assert records.load(Path("r.json"))[0]["notes"] == notes
        return notes

    return run


def test_nothing_to_note(noted, here):
    assert noted("images", "real") == []
    stats("real", here / "ref.npz", Console(quiet=True), features_name="digits")
    assert noted("images", "ref.npz") == []


def test_inception_weights_of_ones_own():
    """By the name of their file; none for the published ones, and for a state dict."""
    of = {"name": "inception", "sha256": "ab" * 32, "num_features": 2048, "resize": "tf1"}

    def said(**more: str) -> list[str]:
        return [*notes(Reference(None), {**of, **more}, {}, 5, None, None)]

    assert said() == said(weights="pt_inception-2015-12-05-6726825d") == []
    [note] = said(weights="mine")
    assert "weights of your own, mine (sha256 abababab)" in note and "only among themselves" in note


def test_statistics_of_unknown_making(noted, here):
    np.savez(here / "other.npz", mu=np.zeros(64), sigma=np.eye(64))
    [note] = noted("images", "other.npz")
    assert (
        note.startswith("other.npz does not say by which features, weights and resize") and "(digits)" in note
    )


@pytest.mark.parametrize("size", [(16, 16), (8, 9)])
def test_another_size_than_the_reference(noted, here, image_folder, size):
    """Also of statistics, which say of what size their images were."""
    image_folder(here, name="other", count=80, size=size, seed=5)
    width, height = size
    [note] = noted("other", "real")
    assert f"{width}x{height} and the reference's 8x8" in note
    stats("real", here / "ref.npz", Console(quiet=True), features_name="digits")
    assert noted("other", "ref.npz") == [note]
    assert noted("other", "real", "--resize", 8) == []


@pytest.mark.parametrize(("images", "real"), [(64, 90), (80, 64), (30, 64)])
def test_no_more_images_than_features(noted, here, images, real):
    for name, count in (("images", images), ("real", real)):
        for path in sorted((here / name).iterdir())[count:]:
            path.unlink()
    [note] = noted("images", "real")
    assert ("of the images" in note) == (images <= 64) and ("of the reference" in note) == (real <= 64)
    assert "64 features" in note and "singular" in note


def test_copies_among_the_images(noted, here):
    for i in range(3):
        shutil.copy(here / "images" / "000.png", here / "images" / f"z{i}.png")
    shutil.copy(here / "images" / "001.png", here / "images" / "y.png")
    assert noted("images", "real") == ["4 of the 84 images are copies of others among them"]


def test_images_of_the_reference(noted, here):
    """All of them, some of them (told by pixels, whatever the format), and against statistics."""
    assert noted("real", "real") == ["the images are those of the reference itself"]
    stats("real", here / "ref.npz", Console(quiet=True), features_name="digits")
    assert noted("real", "ref.npz") == ["the images are those of the reference itself"]
    for i in range(2):
        with Image.open(here / "real" / f"{i:03d}.png") as image:
            image.save(here / "images" / f"z{i}.bmp")
    assert noted("images", "real") == ["2 of the 82 images are also in the reference"]


@pytest.mark.parametrize("where", ["images", "real"])
def test_files_passed_over(noted, here, where):
    (here / where / "notes.txt").write_text("x")
    (here / where / ".hidden.txt").write_text("x")
    [note] = noted("images", "real")
    assert note.startswith(f"{where}: 1 file passed over") and "notes.txt" in note


def test_compare_shows_the_notes_of_both(cli, here, noted):
    shutil.copy(here / "images" / "000.png", here / "images" / "z.png")
    noted("images", "real")
    shutil.copy("r.json", "one.json")
    code, out, _ = cli("compare", "one.json", "r.json")
    assert code == 0
    assert [f"{name}: 1 of the 81 images" in out for name in ("one.json", "r.json")] == [True, True]


def test_records_without_notes_are_read(cli, here, noted):
    """Those of an earlier version; and notes that are none are refused."""
    noted("images", "real")
    record = json.loads(Path("r.json").read_text())
    Path("old.json").write_text(json.dumps({key: value for key, value in record.items() if key != "notes"}))
    assert cli("compare", "old.json", "r.json").code == 0
    for wrong in ("text", [1], {"a": 1}):
        Path("old.json").write_text(json.dumps(record | {"notes": wrong}))
        code, _, err = cli("compare", "old.json", "r.json")
        assert code == 2 and "notes" in err
