"""Images that are decoded when they are asked for: the same as in memory, told apart without being read."""

from __future__ import annotations

import os
import tracemalloc

import datasets
import pyarrow
import pytest
import torch
from PIL import Image

from diffkd.data import folder as folders
from diffkd.data import hub as hubs
from diffkd.data.folder import Folder
from diffkd.data.hub import HubDataset
from diffkd.data.images import Images
from diffkd.errors import UserError
from diffkd.metrics.evaluation.image_sources import DataSource, thinned
from tests.data.helpers import folder, hub, noise, saved, truncate


def opened(path, **fields) -> Images:
    return Folder(kind="folder", path=path, **{"size": 8, "channels": 1} | fields).open()


def opened_hub(path, **fields) -> Images:
    return HubDataset(kind="datasets", path=str(path), **{"size": 8, "channels": 1} | fields).open()


def assert_same(images: Images, loaded: Images) -> None:
    assert (images.name, images.shape, len(images)) == (loaded.name, loaded.shape, len(loaded))
    assert (images.classes, images.class_counts) == (loaded.classes, loaded.class_counts)
    assert list(images.captions) == list(loaded.captions) and images.flip == loaded.flip
    assert (images.labels is None) == (loaded.labels is None)
    assert images.labels is None or torch.equal(images.labels, loaded.labels)
    chosen = torch.tensor([3, 0, 3, len(loaded) - 1])
    for rows in (slice(None), slice(1, 3), slice(len(loaded) - 1, 100), chosen):
        assert torch.equal(images.uint8(rows), loaded.uint8(rows))
    pixels, readable, _ = images.read(slice(1, 4))
    assert torch.equal(pixels, loaded.uint8(slice(1, 4))) and readable.all()


@pytest.fixture
def captioned(tmp_path):
    """Six images of different sizes in two classes, with captions."""
    root = tmp_path / "captioned"
    for i in range(6):
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(8 + i, 12)).save(root / "ab"[i % 2] / f"{i}.png")
        (root / "ab"[i % 2] / f"{i}.txt").write_text(f"number {i}")
    return root


@pytest.mark.parametrize("fields", [{}, {"labelled": False, "channels": 3, "flip": True}, {"size": 4}])
def test_of_a_folder_they_are_those_in_memory(captioned, fields):
    assert_same(opened(captioned, **fields), folder(captioned, **fields))


def test_of_a_dataset_they_are_those_in_memory(tmp_path):
    saved().add_column("text", ["a", None, "c", "d"]).save_to_disk(tmp_path / "set")
    for fields in ({}, {"labelled": False}, {"label": "number"}):
        assert_same(opened_hub(tmp_path / "set", **fields), hub(tmp_path / "set", **fields))


def test_a_batch_is_the_one_in_memory(captioned):
    (x0, cond), (expected, given) = (
        images.batch(20, torch.Generator().manual_seed(3))
        for images in (opened(captioned, flip=True), folder(captioned, flip=True))
    )
    assert torch.equal(x0, expected) and torch.equal(cond["class_labels"], given["class_labels"])


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_they_are_read_in_turn(captioned, size):
    truncate(captioned / "b" / "1.png")
    parts = list(opened(captioned).in_turn(range(1, 5), size))
    pixels, readable, sizes = (torch.cat(one) for one in zip(*parts, strict=True))
    expected, known, had = opened(captioned).read(slice(1, 5))
    assert torch.equal(pixels, expected) and torch.equal(readable, known) and readable.sum() == 3
    assert torch.equal(sizes, had)
    assert [len(one) for one, *_ in parts] == {1: [1] * 4, 2: [2, 2], 3: [3, 1], 8: [4]}[size]


def test_some_of_them_are_taken_without_being_read(captioned, monkeypatch):
    images, loaded = opened(captioned), folder(captioned)
    chosen = torch.tensor([4, 1, 2, 5])
    with monkeypatch.context() as patch:
        patch.setattr(folders, "open_image", lambda path: pytest.fail("it was opened"))
        some = images.take(chosen)
    assert_same(some, loaded.take(chosen))
    assert torch.equal(some.take(torch.tensor([3, 0])).uint8(slice(2)), loaded.uint8(torch.tensor([5, 4])))
    assert list(some.captions) == ["number 3", "number 2", "number 4", "number 5"]


def test_a_reference_of_them_is_the_one_in_memory(captioned):
    ours, theirs = DataSource(opened(captioned)), DataSource(folder(captioned))
    assert ours.content() == theirs.content() and torch.equal(ours.read(1, 4), theirs.read(1, 4))
    assert torch.equal(thinned(ours, 3).read(0, 3), thinned(theirs, 3).read(0, 3))
    assert thinned(ours, 3).content() == thinned(theirs, 3).content() != ours.content()


def test_the_digest_reads_no_image_and_tells_others_apart(captioned, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "open_image", lambda path: pytest.fail("it was opened"))
    known = opened(captioned).digest()
    moved = captioned.rename(tmp_path / "moved")
    assert opened(moved).digest() == known
    settings = ({"size": 4}, {"channels": 3}, {"upscale": True}, {"labelled": False})
    assert len({known, *(opened(moved, **fields).digest() for fields in settings)}) == 5
    (moved / "a" / "0.txt").write_text("another caption")  # which the embeddings are told apart by
    assert opened(moved).digest() == known
    (moved / "a" / "0.png").rename(moved / "a" / "1.png")
    renamed = opened(moved).digest()
    with (moved / "a" / "1.png").open("ab") as file:
        file.write(b"longer")
    assert len({known, renamed, opened(moved).digest()}) == 3


def test_the_digest_of_a_dataset_reads_no_image(tmp_path, monkeypatch):
    saved().save_to_disk(tmp_path / "set")
    saved().select([1, 0, 2, 3]).save_to_disk(tmp_path / "other")
    monkeypatch.setattr(hubs, "open_image", lambda file: pytest.fail("it was opened"))
    known = opened_hub(tmp_path / "set").digest()
    assert opened_hub(tmp_path / "set").digest() == known
    others = [opened_hub(tmp_path / "other"), opened_hub(tmp_path / "set", size=4)]
    assert len({known, *(images.digest() for images in others)}) == 3


def test_one_that_is_no_image_is_marked(captioned, caplog):
    truncate(captioned / "a" / "2.png")
    (captioned / "b" / "5.png").write_bytes(b"no image")
    images = opened(captioned)
    pixels, readable, _ = images.read(slice(0, 6))
    assert readable.tolist() == [True, False, True, True, True, False]
    assert not pixels[~readable].any() and pixels[readable].flatten(1).any(1).all()
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        f"unreadable image: {captioned / 'a' / '2.png'}", f"unreadable image: {captioned / 'b' / '5.png'}",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"image .*5\.png cannot be read \(see above\); repair it"):
        images.uint8(torch.tensor([0, 5, 1]))


def test_a_row_without_an_image_is_marked(tmp_path):
    saved(picture=[Image.fromarray(noise(8, 8)), None, Image.fromarray(noise(8, 8)), None]).save_to_disk(
        tmp_path / "set"
    )
    _, readable, _ = opened_hub(tmp_path / "set").read(slice(4))
    assert readable.tolist() == [True, False, True, False]


@pytest.mark.parametrize("gone", ["deleted", "link"])
def test_one_that_the_system_does_not_give_stops(captioned, gone):
    """It may be there again tomorrow: it must not count as unreadable for ever."""
    if gone == "link":
        (captioned / "a" / "2.png").unlink()
        (captioned / "a" / "2.png").symlink_to("nowhere.png")
    images = opened(captioned)
    (captioned / "a" / "2.png").unlink()
    with pytest.raises(
        UserError, match=r"2\.png cannot be read \(No such file or directory\); bring it back"
    ):
        images.read(slice(0, 6))


def test_one_that_is_too_small_stops(captioned):
    with pytest.raises(UserError, match=r"smaller than .*size 9; use a smaller size"):
        opened(captioned, size=9).read(slice(0, 6))


def peak(work) -> tuple[int, int]:
    """Bytes that our own lines hold of what `work` returns, and that Python had at most on the way."""
    tracemalloc.start()
    try:
        kept = work()
        most = tracemalloc.get_traced_memory()[1]
        ours = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/diffkd/data/*")])
        del kept
        return sum(trace.size for trace in ours.traces), most
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_images(tmp_path):
    """4,000 files of 3 x 64 x 64 numbers: 12 kB each in memory, and a name here."""
    count, image = 4_000, tmp_path / "image.png"
    Image.fromarray(noise(64, 64, 3)).save(image)
    for start in range(0, count, 1000):
        (part := tmp_path / "images" / f"{start:06d}").mkdir(parents=True)
        for i in range(start, start + 1000):
            os.link(image, part / f"{i:09d}.png")
    fields = {"size": 64, "channels": 3, "labelled": False}
    held, most = peak(lambda: opened(tmp_path / "images", **fields))
    assert 10 * count < held < 100 * count and most < 5000 * count
    images = opened(tmp_path / "images", **fields)
    _, reading = peak(lambda: images.read(slice(count - 16, count)))
    assert reading < 10 * 16 * 3 * 64 * 64
    assert torch.equal(images.uint8(slice(count - 1, count)), images.uint8(torch.tensor([0])))


def test_while_a_folder_is_listed_of_each_image_its_name_is_held(tmp_path):
    """And its label, and in the end a caption: no path, and nothing of what the system says of a file."""
    count = 3_000
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
    for i in range(count):
        (tmp_path / "images" / ("a" if i % 3 else "b") / f"{i:012d}.png").touch()
    held, most = peak(lambda: opened(tmp_path / "images"))
    assert 20 * count < held < 50 * count and most < 180 * count
    for path in (tmp_path / "images").glob("*/*"):
        path.with_suffix(".txt").write_text(f"caption {path.stem}")
    held, most = peak(lambda: opened(tmp_path / "images"))
    assert 40 * count < held < 80 * count and most < 320 * count


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Of a row there are its caption and its label; the images stay on the disk."""
    count = 20_000
    rows = {
        "image": [{"bytes": bytes(1000), "path": None}] * count,
        "label": [i % 3 for i in range(count)],
        "text": [f"{i:030d}" for i in range(count)],
    }
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(3), text=datasets.Value("string")
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set", num_shards=4)
    del rows
    before = pyarrow.total_allocated_bytes()
    held, most = peak(lambda: opened_hub(tmp_path / "set"))
    assert 30 * count < held < 100 * count and most < 1000 * count
    assert pyarrow.total_allocated_bytes() - before < 100 * count
