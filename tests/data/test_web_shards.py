"""Files that `datasets` reads: WebDataset shards and parquet; captions in text and JSON; no pickle is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from diffkd.data.hub import HubDataset
from diffkd.errors import UserError
from tests.data.helpers import hub

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _rows_of_its_own(tmp_path, monkeypatch):
    """Where `datasets` writes its Arrow files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS[number]).save(stream, "PNG")
    return stream.getvalue()


def shard(path: Path, numbers: range, captions=lambda i: {"txt": f"number\n  {i}\n".encode()}) -> None:
    """A tar file with these of PIXELS, and what `captions` puts beside each, by its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in numbers:
            for suffix, content in ({"png": png(i)} | captions(i)).items():
                entry = tarfile.TarInfo(f"{i:06d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    for number in range(3):
        shard(tmp_path / "shards" / f"{number:03d}.tar", range(7 * number, min(7 * number + 7, 20)))
    return tmp_path / "shards"


@pytest.mark.parametrize("name", ["", "*.tar", "**/*.tar"])
def test_shards_are_read_in_the_order_of_their_names(shards, name):
    images = hub(shards / name)
    assert np.array_equal(images.pixels[:, 0], PIXELS)
    assert images.captions == [f"number {i}" for i in range(20)] and images.labels is None
    opened = HubDataset(kind="datasets", path=str(shards / name), size=8, channels=1).open()
    assert np.array_equal(opened.pixels[::-3], images.pixels[::-3])
    assert list(opened.captions) == images.captions


def test_one_shard_and_part_of_the_rows(shards):
    assert np.array_equal(hub(shards / "001.tar").pixels[:, 0], PIXELS[7:14])
    assert np.array_equal(hub(shards, split="train[5:8]").pixels[:, 0], PIXELS[5:8])


def test_a_folder_called_as_a_kind_of_files(shards, monkeypatch):
    monkeypatch.chdir(shards.rename(shards.with_name("parquet")).parent)
    assert len(hub("parquet")) == 20
    with pytest.raises(UserError, match="pandas is a kind of files, not a dataset"):
        hub("pandas")


def test_captions_and_classes_beside_images(tmp_path):
    """JSON need not have the same keys in every sample."""

    def beside(i):
        told = {"caption": f"number {i}", "said": ["so", "or so"], "extra": None if i < 6 else "text"}
        return {"json": json.dumps(told | ({"odd": i} if i % 2 else {})).encode(), "cls": b"%d\n" % (i % 3)}

    shard(tmp_path / "shards" / "0.tar", range(9), beside)
    images = hub(tmp_path / "shards", label="cls")
    assert images.captions == [f"number {i}" for i in range(9)]
    assert images.labels.tolist() == [i % 3 for i in range(9)] and images.classes == ["0", "1", "2"]
    assert hub(tmp_path / "shards", text="json.said").captions == ["so"] * 9
    assert hub(tmp_path / "shards", text="json.absent").captions == [""] * 9
    assert hub(tmp_path / "shards").labels is None
    with pytest.raises(UserError, match=r"no captions in column 'json\.odd'"):
        hub(tmp_path / "shards", text="json.odd")
    with pytest.raises(UserError, match="no column 'told'"):
        hub(tmp_path / "shards", text="told.caption")


def test_json_that_is_none(tmp_path):
    shard(tmp_path / "shards" / "0.tar", range(3), lambda i: {"json": b"{'caption'"})
    with pytest.raises(UserError, match="captions in column 'json' that are not JSON"):
        hub(tmp_path / "shards")


def test_images_without_captions(tmp_path):
    shard(tmp_path / "shards" / "0.tar", range(3), lambda i: {"json": b'{"width": 8}'})
    assert hub(tmp_path / "shards").captions == []


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("first", [0, 8])  # columns are those of the first five samples
@pytest.mark.parametrize("suffix", ["pkl", "PKL", "pyd", "pickle", "pt", "pth", "pkl.gz", "png.pth"])
def test_shards_with_pickles_are_refused(tmp_path, suffix, first):
    attack = pickle.dumps(Attack(tmp_path / "ran"))
    with pytest.raises(FileExistsError):  # it would run
        (tmp_path / "ran").mkdir()
        pickle.loads(attack)
    (tmp_path / "ran").rmdir()
    shard(tmp_path / "shards" / "0.tar", range(10), lambda i: {suffix: attack} if i >= first else {})
    with pytest.raises(UserError, match=rf"^0\.tar holds 00000{first}\.{suffix}, and pickles can run code"):
        hub(tmp_path / "shards")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", ["txt", "json", "TXT"])
def test_text_in_another_encoding_is_said_by_its_name(tmp_path, suffix):
    texts = {7: "café".encode("latin-1")}
    shard(tmp_path / "shards" / "0.tar", range(10), lambda i: {suffix: texts.get(i, b'"a"')})
    with pytest.raises(UserError, match=rf"^0\.tar holds 000007\.{suffix}, which is not text in UTF-8"):
        hub(tmp_path / "shards")


def array_of_objects(attack: object) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([attack], object), allow_pickle=True)
    return stream.getvalue()


@pytest.mark.parametrize("suffix", ["npy", "npz", "ten", "mp", "cbor", "bin"])
def test_what_else_a_sample_holds_stays_bytes(tmp_path, suffix):
    attack = array_of_objects(Attack(tmp_path / "ran"))
    shard(tmp_path / "shards" / "0.tar", range(3), lambda i: {suffix: attack})
    assert np.array_equal(hub(tmp_path / "shards").pixels[:, 0], PIXELS[:3])
    assert not (tmp_path / "ran").exists()


def test_a_shard_that_is_cut_off(tmp_path, caplog):
    """Where a header was cut, reading ends as if the shard did; where a file was, it fails."""
    shard(tmp_path / "whole" / "0.tar", range(6))
    whole = (tmp_path / "whole" / "0.tar").read_bytes()
    assert len(hub(tmp_path / "whole")) == 6 and not caplog.records
    (tmp_path / "header").mkdir()
    (tmp_path / "header" / "0.tar").write_bytes(whole[: 4 * 4 * 512 + 100])
    assert len(hub(tmp_path / "header")) == 4
    assert "header/0.tar does not end as tar files do: it may be cut off" in caplog.text
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "0.tar").write_bytes(whole[: 4 * 4 * 512 + 600])
    with pytest.raises(UserError, match="cannot be read: unexpected end of data"):
        hub(tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"no tar file" * 1000])
def test_what_is_no_shard(tmp_path, content):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"shards \(split train\) cannot be read: "):
        hub(tmp_path / "shards")


def test_patterns_that_name_nothing_or_several_kinds(shards):
    with pytest.raises(UserError, match=r"\*\.parquet names no files; give a folder, or a pattern"):
        hub(shards / "*.parquet")
    (shards / "more.csv").write_text("text\nword\n")
    with pytest.raises(UserError, match=r"files of '\.csv', '\.tar'; give those of one kind"):
        hub(shards / "*")
    (shards / "more.xyz").write_text("")
    with pytest.raises(UserError, match=r"files of '\.xyz'; give those of one kind: \.tar, \.parquet"):
        hub(shards / "more.xyz")


@pytest.mark.parametrize("kept", ["bytes", "struct"])
def test_parquet_that_does_not_say_which_column_is_an_image(tmp_path, kept):
    """A column of bytes, or of bytes and paths, is one where it is named."""
    held = [png(i) if kept == "bytes" else {"bytes": png(i), "path": None} for i in range(5)]
    rows = datasets.Dataset.from_dict({"jpg": held, "caption": list("abcde")})
    (tmp_path / "rows").mkdir()
    rows.to_parquet(tmp_path / "rows" / "0.parquet")
    for name in ("rows", "rows/*.parquet"):
        images = hub(tmp_path / name, image="jpg")
        assert np.array_equal(images.pixels[:, 0], PIXELS[:5]) and images.captions == list("abcde")
    with pytest.raises(UserError, match="has no image column; it has jpg, caption"):
        hub(tmp_path / "rows")


def test_json_lines_have_captions_and_no_images(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl has no image column; it has text"):
        hub(tmp_path / "rows.jsonl")


def test_nothing_is_shown_where_there_is_no_terminal(shards, capfd):
    hub(shards)
    assert capfd.readouterr() == ("", "") and not datasets.are_progress_bars_disabled()
