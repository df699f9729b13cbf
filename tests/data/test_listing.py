"""What a folder holds: hidden files, links, classes in order, metadata files, files passed over."""

from __future__ import annotations

import json
import logging
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffkd.data.decoding import SUFFIXES
from diffkd.data.listing import list_folder
from diffkd.errors import UserError
from diffkd.metrics.evaluation.image_sources import FolderSource
from tests.data.helpers import folder, noise


def both(root: Path) -> int:
    """The number of images that training and evaluation read, which must agree."""
    count = len(FolderSource(root, None))
    assert len(folder(root)) == count
    return count


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_is_data(tmp_path, suffix):
    Image.fromarray(noise(8, 8)).save(tmp_path / f"a{suffix}", format="PNG")  # told by content
    Image.fromarray(noise(8, 8)).save(tmp_path / f"b{suffix.upper()}", format="PNG")
    assert both(tmp_path) == 2


@pytest.mark.parametrize(
    "hidden", [".a.png", "._000.png", ".DS_Store", ".ipynb_checkpoints/0.png", "a/.deep/er/0.png", ".git/x"]
)
def test_hidden_files_are_not_data(tmp_path, image_folder, hidden):
    root = image_folder(tmp_path, classes=["a", "b"], count=3)
    place = root / hidden
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(b"\0\5\x16\7")  # not an image, whatever its suffix
    assert both(root) == 6 and folder(root).classes == ["a", "b"]
    assert not list_folder(root).passed_over


def test_a_hidden_folder_that_is_named_is_read(tmp_path, image_folder):
    assert both(image_folder(tmp_path, name=".cache")) == 4


def test_linked_class_folders_and_files_are_followed(tmp_path, image_folder):
    real = image_folder(tmp_path, name="real", classes=["x", "y"], count=3)
    root = tmp_path / "root"
    root.mkdir()
    (root / "1").symlink_to(real / "x")
    (root / "0").symlink_to(real / "y")
    (root / "2").mkdir()
    (root / "2" / "a.png").symlink_to(real / "x" / "000.png")
    assert both(root) == 7
    images = folder(root)
    assert images.classes == ["0", "1", "2"] and images.class_counts == [3, 3, 1]
    assert np.array_equal(images.pixels[:3], folder(real / "y").pixels)
    assert FolderSource(root, None).labels.tolist() == images.labels.tolist()


def test_images_are_in_the_order_of_their_paths(tmp_path):
    """Part by part: what is in a folder before files that begin with its name. With a text beside some."""
    names = ["a.png", "a/b.png", "a/b/c.png", "a b/c.png", "A/z.PNG", "a/b.c.png", "a-b.png", "é/\udcff.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b").touch()
    for name in ("a/b.txt", "a b/c.txt", "a/b/d.txt"):
        (tmp_path / name).write_text(f"of {name}")
    found = list_folder(tmp_path)
    paths = sorted(tmp_path / name for name in names)
    assert list(found.paths) == paths and found.paths[2:5] == paths[2:5] and found.paths[-1] == paths[-1]
    said = {"a/b.png": "of a/b.txt", "a b/c.png": "of a b/c.txt"}
    assert list(found.captions) == [said.get(str(path.relative_to(tmp_path)), "") for path in paths]
    assert list(found.passed_over) == [tmp_path / "a/b/d.txt", tmp_path / "b"] and found.loose == 2


def test_links_around_in_a_circle(tmp_path, image_folder):
    """Of two folders, of one to itself and to its parent, and of many to each other: each is read once."""
    root = image_folder(tmp_path, classes=[str(i) for i in range(9)], count=1)
    for i in range(9):
        for j in range(9):
            (root / str(i) / f"to{j}").symlink_to(root / str(j))
        (root / str(i) / "up").symlink_to(root)
        (root / str(i) / "self.png").symlink_to("self.png")
    found = list_folder(root)
    images = [path for path in found.paths if path.name != "self.png"]
    assert len(images) == 9 * 9 and found.classes == [str(i) for i in range(9)]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, image_folder, monkeypatch):
    root = image_folder(tmp_path, classes=["a", "b"])
    import os

    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    for read in (lambda: folder(root), lambda: FolderSource(root, None)):
        with pytest.raises(UserError, match=r"folder .*/b cannot be read .*Permission"):
            read()


def test_files_passed_over_are_said(tmp_path, image_folder, caplog):
    root = image_folder(tmp_path, classes=["a"])
    for name in ("notes.txt", "a/image.tga", "a/b.psd", "Thumbs.db"):
        (root / name).write_bytes(b"x")
    with caplog.at_level(logging.WARNING, "diffkd"):
        folder(root)
    [note] = FolderSource(root, None).notes
    assert caplog.messages == [note]
    assert note.startswith(f"{root}: 4 files passed over") and "Thumbs.db, a/b.psd, a/image.tga, ..." in note


def test_classes_in_the_order_of_their_numbers(tmp_path, image_folder):
    root = image_folder(tmp_path, classes=["10", "2", "1", "01"], count=2)
    by_name, by_number = folder(root), folder(root, class_order="number")
    assert by_name.classes == ["01", "1", "10", "2"] and by_number.classes == ["01", "1", "2", "10"]
    assert np.array_equal(by_name.pixels, by_number.pixels)
    named = [[images.classes[label] for label in images.labels] for images in (by_name, by_number)]
    assert named[0] == named[1]
    image_folder(tmp_path, classes=["cat"], count=1)
    with pytest.raises(UserError, match="class_order number .* 'cat'"):
        folder(root, class_order="number")


# metadata


def write(root: Path, rows: list[dict], kind: str = "jsonl") -> Path:
    path = root / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        keys = list(rows[0])
        lines = [",".join(keys), *(",".join(f'"{row[key]}"' for key in keys) for row in rows)]
        path.write_text("\n".join(lines), encoding="utf-8-sig")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_labels_and_captions_by_metadata(tmp_path, image_folder, kind):
    root = image_folder(tmp_path, count=4)
    names = ["zebra", "ant", "zebra", "bee"]
    texts = ["a, b", "", 'ä "c"' if kind == "jsonl" else "ä", "d"]
    rows = [{"file_name": f"{i:03d}.png", "text": texts[i], "label": names[i]} for i in (2, 0, 3, 1)]
    write(root, rows, kind)
    images = folder(root)
    assert images.classes == ["ant", "bee", "zebra"] and images.labels.tolist() == [2, 0, 2, 1]
    assert images.captions == texts
    assert FolderSource(root, None).labels.tolist() == [2, 0, 2, 1]
    assert folder(root, labelled=False).labels is None


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_labels_that_are_numbers_stay(tmp_path, image_folder, kind):
    root = image_folder(tmp_path, count=3)
    write(root, [{"file_name": f"{i:03d}.png", "label": label} for i, label in enumerate((3, 0, 3))], kind)
    images = folder(root)
    assert images.labels.tolist() == [3, 0, 3] and images.classes == ["0", "1", "2", "3"]


def test_metadata_in_subfolders_and_without_labels(tmp_path, image_folder):
    """Names are relative to the metadata file; without labels, subfolders are the classes."""
    root = image_folder(tmp_path, classes=["a", "b"], count=2)
    write(root / "b", [{"file_name": "001.png", "caption": "one"}])
    images = folder(root)
    assert images.captions == ["", "", "", "one"] and images.classes == ["a", "b"]


def test_images_that_are_not_there_are_said(tmp_path, image_folder, caplog):
    root = image_folder(tmp_path, count=2)
    write(root, [{"file_name": name, "artist": "t"} for name in ("000.png", "gone.png", "../x.png")])
    with caplog.at_level(logging.WARNING, "diffkd"):
        assert len(folder(root)) == 2
    assert "2 images" in caplog.text and "gone.png" in caplog.text


FINE = {"file_name": "000.png", "label": 0}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"label": 1}], "line 1: it has no file_name"),
        ([{"file_name": 3}], "line 1: it has no file_name"),
        ([FINE, FINE], "line 2: '000.png' is there twice"),
        ([FINE], "001.png: its label in the metadata is None"),
        ([FINE, {"file_name": "001.png", "label": "b"}], "001.png: its label in the metadata is 'b'"),
        ([FINE, {"file_name": "001.png", "label": -1}], "001.png: its label in the metadata is -1"),
        ([FINE, {"file_name": "001.png", "label": True}], "001.png: its label in the metadata is True"),
        (
            [FINE, {"file_name": "001.png", "label": 10**9}],
            "001.png: its label in the metadata is 1000000000",
        ),
        ([{"file_name": "000.png", "label": 0.5}], "000.png: its label in the metadata is 0.5"),
    ],
)
def test_metadata_that_is_refused(tmp_path, image_folder, rows, says):
    root = image_folder(tmp_path, count=2)
    write(root, rows)
    for read in (lambda: folder(root), lambda: FolderSource(root, None)):
        with pytest.raises(UserError) as error:
            read()
        assert says in str(error.value)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b'{"file_name": "000.png"}\n' + b"[" * 9999])
def test_metadata_that_is_broken(tmp_path, image_folder, content):
    root = image_folder(tmp_path, count=2)
    (root / "metadata.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"metadata\.jsonl"):
        folder(root)


def test_captions_by_text_files_of_the_same_name(tmp_path, caplog):
    for name, text in {"a.png": "a red  ring\n", "b.png": None, "c.png": "\ufeffa star"}.items():
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        if text is not None:
            (tmp_path / name).with_suffix(".txt").write_text(text, encoding="utf-8")
    found = list_folder(tmp_path)
    assert [*found.captions] == ["a red ring", "", "a star"] and not found.passed_over


def test_captions_that_are_no_text_in_utf_8(tmp_path):
    """Halves of surrogate pairs, which JSON may have: a pair is joined, a half replaced."""
    for name in ("a", "b"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"{name}.png")
    rows = [
        r'{"file_name": "a.png", "text": "a \ud83d\ude00"}', r'{"file_name": "b.png", "text": "b \ud83d c"}'
    ]  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    captions = [*list_folder(tmp_path, "name").captions]
    assert captions == ["a \U0001f600", "b \ufffd c"] and all(one.encode() for one in captions)


def test_captions_of_images_that_are_not_there(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"file_name": f"{name}.png", "text": name} for name in "abcde"]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"4 images .* are not there \(b.png, c.png, d.png, ...\)"):
        list_folder(tmp_path)
    write(tmp_path, [{"file_name": f"{name}.jpg", "text": name} for name in "ab"])  # of none that is there
    with pytest.raises(UserError, match=r"2 images .* are not there \(a.jpg, b.jpg\); bring"):
        list_folder(tmp_path)
    write(tmp_path, [{"file_name": "a.png", "text": "a"}, {"file_name": "b.png"}])
    with pytest.raises(UserError, match=r"1 image that .* is not there \(b.png\); bring"):
        list_folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(UserError, match="metadata.jsonl is empty"):
        list_folder(tmp_path)


@pytest.mark.parametrize("relative", [False, True])
def test_an_image_is_named_in_any_way(tmp_path, image_folder, monkeypatch, relative):
    """As programs on other systems write it, whichever way the folder itself is named."""
    root = image_folder(tmp_path, classes=["a", "b"], count=3)
    names = ["./000.png", "../a/001.png", str(root / "a/002.png"), "../b/000.png", "..\\b\\001.png", "/x.png"]
    write(root / "a", [{"file_name": name, "text": str(i)} for i, name in enumerate(names[:5])])
    monkeypatch.chdir(tmp_path)
    root = Path(root.name) if relative else root
    assert [*list_folder(root).captions] == ["0", "1", "2", "3", "4", ""]
    write(root / "a", [{"file_name": name, "text": "x"} for name in names[4:]])
    with pytest.raises(UserError, match=r"1 image .* is not there \(/x.png\)"):
        list_folder(root)


@pytest.mark.parametrize("named", ["NFC", "NFD"])
@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_accents_may_be_composed_otherwise(tmp_path, image_folder, named, stored):
    root = image_folder(tmp_path, count=1)
    (root / "000.png").rename(root / unicodedata.normalize(stored, "\u00e9t\u00e9.png"))
    write(root, [{"file_name": unicodedata.normalize(named, "\u00e9t\u00e9.png"), "text": "summer"}])
    assert [*list_folder(root).captions] == ["summer"]


def test_captions_of_several_kinds(tmp_path, image_folder):
    """The first of several, by either key, row by row; what is no text is not made one."""
    root = image_folder(tmp_path, count=5)
    said = [{"text": ["a", "b"]}, {"caption": "c"}, {"text": None, "caption": ["d"]}, {"text": []}, {}]
    rows = [{"file_name": f"{i:03d}.png", **more} for i, more in enumerate(said)]
    write(root, rows)
    assert [*list_folder(root).captions] == ["a", "c", "d", "", ""]
    for value in (5, {"en": "a"}, [1], True):
        write(root, [*rows[:4], {"file_name": "004.png", "text": value}])
        with pytest.raises(UserError, match=r"metadata.jsonl, line 5: its caption is no text \(it is "):
            list_folder(root)
