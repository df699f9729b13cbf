"""Data sets that are read as they come: the rows, the cache and the run of the same data on the disk."""

from __future__ import annotations

import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffkd.data import shards
from diffkd.data.hub import HubDataset
from diffkd.data.latents import LatentCache
from diffkd.data.streams import Streamed
from diffkd.errors import UserError
from tests import text_to_image
from tests.refusals import refuse
from tests.runs.tiny import OF_LATENTS, TEACHER

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def parquet(path: Path, numbers: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({
        "image": datasets.Image(), "text": datasets.Value("string"),
        "sort": datasets.ClassLabel(names=["ant", "bee"]), "size": datasets.Value("int64"),
    })  # fmt: skip
    rows = {
        "image": [{"bytes": png(PIXELS[i]), "path": None} for i in numbers],
        "text": [f"number {i}" for i in numbers], "sort": [i % 2 for i in numbers], "size": [*numbers],
    }  # fmt: skip
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


@pytest.fixture(autouse=True)
def arrow(tmp_path, monkeypatch) -> Path:
    """Where `datasets` writes rows; files of the cache hold three of these images' latents."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.setattr(shards, "SHARD_BYTES", 3 * 4 * 2 * 4 * 4)
    return tmp_path / "arrow"


@pytest.fixture(params=["tar", "parquet"])
def data(request, tmp_path) -> Path:
    """Three files of seven of PIXELS, the last of six."""
    for number in range(3):
        own = range(7 * number, min(7 * number + 7, 20))
        path = tmp_path / "data" / f"{number}.{request.param}"
        if request.param == "parquet":
            parquet(path, own)
        else:
            pairs = [{f"{i:02d}.png": png(PIXELS[i]), f"{i:02d}.txt": b"number %d" % i} for i in own]
            tar(path, {name: content for pair in pairs for name, content in pair.items()})
    return tmp_path / "data"


@pytest.fixture
def passes(monkeypatch) -> list[list[str] | None]:
    """The columns of every pass that is begun; after them, the rows of each that gave images."""
    begun: list[list[str] | None] = []
    rows = Streamed._rows
    monkeypatch.setattr(Streamed, "_rows", lambda self, columns: begun.append(columns) or rows(self, columns))
    return begun


def opened(path: Path, kept: Path | None = None, **fields):
    return HubDataset(kind="datasets", path=str(path), size=8, channels=1, **fields).open(kept)


class Halves:
    """A codec whose latents are means of four pixels."""

    key, image_channels, factor = "halves", 1, 2

    def shape(self, height, width):
        return 1, height // 2, width // 2

    def moments(self, images):
        mean = torch.nn.functional.avg_pool2d(images, 2)
        return mean, torch.full_like(mean, 0.1)

    def close(self):
        pass


def cache(folder, images):
    return LatentCache(folder, images, Halves(), None)


def filled(folder, images):
    made = cache(folder, images)
    made.fill(0, 1, lambda: None, lambda count: None)
    assert made.left() == 0
    return made


def latents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.glob("latents/*/*")}


def test_what_comes_is_what_would_lie_on_the_disk(data, arrow):
    """In order and out of it; told from other data by the same digest, so that a cache fits both."""
    streamed = opened(data, streaming=True)
    pixels = np.concatenate([streamed.pixels[start : start + 3] for start in range(0, 20, 3)])
    assert np.array_equal(pixels[:, 0], PIXELS)
    chosen = np.array([13, 2, 13, 19, 0])
    assert np.array_equal(streamed.pixels[chosen][:, 0], PIXELS[chosen])
    assert not [*arrow.rglob("*.arrow")]
    stored = opened(data)
    assert [*arrow.rglob("*.arrow")]
    assert list(streamed.captions) == list(stored.captions) == [f"number {i}" for i in range(20)]
    assert streamed.classes == stored.classes and streamed.class_counts == stored.class_counts
    assert streamed.digest() == stored.digest()


def test_a_cache_is_filled_by_one_pass_and_then_needs_none(data, passes, arrow, tmp_path):
    filled(tmp_path / "stored", opened(data))
    read = Streamed._come
    images = opened(data, tmp_path / "cache", streaming=True)
    listing = [columns for columns in passes if columns]
    assert len(listing) == 1 and not {"png", "image"} & {*listing[0]}
    passes.clear()
    made = filled(tmp_path / "cache", images)
    assert len(passes) == 1 and passes[0] in (["png"], ["image"])
    assert latents(tmp_path / "cache") == latents(tmp_path / "stored") and len(made) == 20
    passes.clear()
    again = opened(data, tmp_path / "cache", streaming=True)
    assert cache(tmp_path / "cache", again).left() == 0 and not passes
    assert list(again.captions) == list(images.captions) and again.class_counts == images.class_counts
    # what is missing comes, and no more
    gone = sorted((tmp_path / "cache").glob("latents/*/*.safetensors"))[4]
    gone.unlink()
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Streamed, "_come", lambda self, rest: rows.append(self._next) or read(self, rest))
        filled(tmp_path / "cache", again)
    assert rows == [12, 13, 14] and latents(tmp_path / "cache") == latents(tmp_path / "stored")


def test_several_processes_read_each_its_own_part(data, passes, tmp_path):
    filled(tmp_path / "stored", opened(data))
    parts, barrier = [opened(data, streaming=True) for _ in range(3)], Barrier(3)
    passes.clear()
    with ThreadPoolExecutor(3) as processes:
        made = [cache(tmp_path / "cache", images) for images in parts]
        works = [
            processes.submit(one.fill, rank, 3, barrier.wait, lambda count: None)
            for rank, one in enumerate(made)
        ]
        for work in works:
            work.result()
    assert len(passes) == 3 and latents(tmp_path / "cache") == latents(tmp_path / "stored")


def test_a_stream_that_breaks_goes_on_when_it_is_whole(tmp_path):
    """At a file that is cut off, and at one that is gone, which is another data set."""
    for number in range(2):
        files = {f"{i}.png": png(PIXELS[i]) for i in range(5 * number, 5 * number + 5)}
        tar(tmp_path / "data" / f"{number}.tar", files)
    images, second = opened(tmp_path / "data", streaming=True), tmp_path / "data" / "1.tar"
    whole = second.read_bytes()
    second.write_bytes(whole[:600])
    with pytest.raises(UserError, match=r"cannot be read on from row 5 \(.*\); the same command goes on"):
        images.pixels[4:6]
    second.write_bytes(whole)
    assert np.array_equal(images.pixels[4:6][:, 0], PIXELS[4:6])
    images.pixels[0:1]
    second.unlink()
    fresh = opened(tmp_path / "data", streaming=True)
    assert len(fresh) == 5 and fresh.digest() != images.digest()


def test_rows_that_are_fewer_than_were_listed(tmp_path):
    for number in range(2):
        tar(tmp_path / "data" / f"{number}.tar", {f"{number}.png": png(PIXELS[number])})
    images = opened(tmp_path / "data", streaming=True)
    (tmp_path / "data" / "1.tar").unlink()
    with pytest.raises(UserError, match="ends after 1 rows, and had more when they were listed"):
        images.pixels[0:2]


def test_what_cannot_be_streamed(data, tmp_path):
    with pytest.raises(UserError, match="buckets goes by the sizes of all .*; leave out one of the two"):
        opened(data, streaming=True, buckets=4)
    with pytest.raises(UserError, match="streaming is for the images of a model of .*: leave it out"):
        HubDataset(kind="datasets", path=str(data), size=8, streaming=True).load()
    opened(data).pixels[0:1]
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="lies there as save_to_disk wrote it; leave it out"):
        opened(tmp_path / "saved", streaming=True)
    for path, says in ((tmp_path / "none/*.tar", "names no files"), (data / "*", "Bad split: nowhere")):
        with pytest.raises(UserError, match=says):
            opened(path, streaming=True, split="nowhere")


def test_a_run_whose_cache_is_full_reads_no_row(cli, arrow, tmp_path, monkeypatch, passes):
    """`diffkd cache`, then the run, which reads no row; pixels are refused in one line."""
    monkeypatch.chdir(tmp_path)
    text_to_image.teacher_and_images(tmp_path, ["a red ring", "a star"])
    files = {path.name: path.read_bytes() for path in sorted((tmp_path / "images").iterdir())}
    tar(tmp_path / "shards" / "0.tar", files)
    data = {"kind": "datasets", "path": "shards", "size": 32}
    content = {**OF_LATENTS, "data": {**data, "streaming": True}, "pictures": 0}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    outcome = cli("cache", "run.yaml")
    assert outcome.code == 0, outcome.stderr
    assert "13 captions and images computed" in outcome.stdout and not [*arrow.rglob("*.arrow")]
    passes.clear()
    assert cli("distill", "run.yaml", "method.steps=[2]", "method.updates=1").code == 0 and not passes
    teacher = {**TEACHER, "data": {**data, "streaming": True}}
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(teacher))
    says = ["data.streaming is for the images of a model of latents", "leave it out"]
    refuse(cli, tmp_path, "train", "teacher.yaml", says=says)
