"""The cache of latents of images that are decoded as it is filled: unreadable ones, killed processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffkd.data import latents, shards
from diffkd.data.folder import Folder
from diffkd.data.hub import HubDataset
from diffkd.data.latents import LatentCache
from diffkd.errors import UserError
from diffkd.models import loading
from tests import text_to_image
from tests.data.helpers import truncate
from tests.waiting import ONE_THREAD

COUNT = 10
TWO_IMAGES = 2 * 2 * 4 * 4 * 64  # bytes of a file of the cache


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    work = tmp_path_factory.mktemp("model")
    text_to_image.pipeline(work / "parts").save_pretrained(work / "model", safe_serialization=True)
    return work / "model"


@pytest.fixture
def root(tmp_path):
    """A folder of captioned images."""
    (tmp_path / "images").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3), np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text(f"caption {i // 2}")
    return tmp_path / "images"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", TWO_IMAGES)


def images_in(root):
    return Folder(kind="folder", path=root, size=32).open()


def cache(folder, model, images) -> LatentCache:
    denoiser = loading.load(model)
    return LatentCache(folder, images, denoiser.codec, denoiser.conditioner)


def filled(folder, model, images) -> LatentCache:
    made = cache(folder, model, images)
    made.fill(0, 1, lambda: None, lambda count: None)
    assert made.left() == 0
    return made


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shards_of(folder) -> dict[tuple[str, str], bytes]:
    """By kind and number, without what says of which data they are."""
    return {(path.parts[-3], path.name): path.read_bytes() for path in folder.glob("*/*/*.safetensors")}


def test_it_holds_what_it_holds_of_images_in_memory(model, root, tmp_path):
    later = filled(tmp_path / "later", model, images_in(root))
    at_once = filled(tmp_path / "at_once", model, Folder(kind="folder", path=root, size=32).load())
    assert shards_of(tmp_path / "later") == shards_of(tmp_path / "at_once")
    (x0, cond), (expected, given) = (
        made.batch(16, torch.Generator().manual_seed(0)) for made in (later, at_once)
    )
    assert torch.equal(x0, expected) and all(torch.equal(cond[key], given[key]) for key in given)


def test_shards_of_tar_files_give_the_same_latents(model, root, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    (tmp_path / "shards").mkdir()
    for number in range(2):
        with tarfile.open(tmp_path / "shards" / f"{number}.tar", "w") as tar:
            for path in sorted(root.iterdir())[10 * number : 10 * number + 10]:
                tar.add(path, path.name)
    images = HubDataset(kind="datasets", path=str(tmp_path / "shards"), size=32).open()
    filled(tmp_path / "of_tars", model, images)
    filled(tmp_path / "of_files", model, images_in(root))
    assert shards_of(tmp_path / "of_tars") == shards_of(tmp_path / "of_files")


def test_unreadable_images_are_never_drawn(model, root, tmp_path, caplog):
    """The others keep their numbers and captions; the cache is whole, and is not made again."""
    whole = filled(tmp_path / "whole", model, images_in(root))
    truncate(root / "3.png")
    made = filled(tmp_path / "cache", model, images_in(root))
    assert ["3.png" in line.getMessage() for line in caplog.records] == [True]
    assert made.readable.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9] and len(made) == COUNT
    for again in (made, cache(tmp_path / "cache", model, images_in(root))):
        indices = again.indices(500, torch.Generator().manual_seed(0))
        assert {*indices.tolist()} == {0, 1, 2, 4, 5, 6, 7, 8, 9}
        mean, std = (torch.stack([whole._rows(i, key) for i in indices.tolist()]) for key in ("mean", "std"))
        rng = torch.Generator().manual_seed(0)
        torch.randint(9, (500,), generator=rng)
        x0, cond = again.batch(500, torch.Generator().manual_seed(0))
        assert torch.allclose(x0, mean + std * torch.randn(mean.shape, generator=rng), atol=1e-5)
        assert torch.equal(cond["encoder_hidden_states"], whole.cond(indices)["encoder_hidden_states"])
    left = made.readable_images()
    assert list(left.captions) == [f"caption {i // 2}" for i in made.readable]
    assert torch.equal(left.uint8(slice(9)), images_in(root).uint8(made.readable))
    assert whole.readable_images() is whole.images


def test_many_unreadable_images_stop_it_before_their_file_is_written(model, root, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "FEW_UNREADABLE", 1)
    for i in (2, 3):
        truncate(root / f"{i}.png")
    made = cache(tmp_path / "cache", model, images_in(root))
    with pytest.raises(UserError, match=r"2 of 2 images in a row of .* cannot be read; remove or repair"):
        made.fill(0, 1, lambda: None, lambda count: None)
    assert [path.name for path in sorted((tmp_path / "cache" / "latents").glob("*/*"))] == [
        "000000.safetensors", "latents.json",
    ]  # fmt: skip


def test_many_unreadable_images_in_all_end_the_run(model, root, tmp_path):
    for i in (3, 8):
        (root / f"{i}.png").write_bytes(b"no image")
    made = filled(tmp_path / "cache", model, images_in(root))
    for _ in range(2):
        with pytest.raises(UserError, match=r"2 of 10 images of .* cannot be read; remove or repair"):
            made.check()


def test_a_single_image_that_is_unreadable_is_too_many(model, root, tmp_path):
    for i in range(1, COUNT):
        (root / f"{i}.png").unlink()
    truncate(root / "0.png")
    made = filled(tmp_path / "cache", model, images_in(root))
    with pytest.raises(UserError, match=r"1 of 1 images of .* cannot be read"):
        made.check()


def test_a_file_that_is_gone_stops_it_until_it_is_back(model, root, tmp_path):
    filled(tmp_path / "whole", model, images_in(root))
    made = cache(tmp_path / "cache", model, images_in(root))
    (root / "5.png").rename(tmp_path / "5.png")
    with pytest.raises(
        UserError, match=r"5\.png cannot be read \(No such file or directory\); bring it back"
    ):
        made.fill(0, 1, lambda: None, lambda count: None)
    (tmp_path / "5.png").rename(root / "5.png")
    filled(tmp_path / "cache", model, images_in(root))
    assert files(tmp_path / "cache") == files(tmp_path / "whole")


KILLED = """
import os, signal, sys
from fnmatch import fnmatch
from pathlib import Path
from diffkd.data import latents, shards
from tests.data import test_latents_on_demand as tests

cache, model, root, event, ending = sys.argv[1:]

def struck(name, what):
    if name == event and any(fnmatch(str(one), ending) for one in what[:2]):
        os.kill(os.getpid(), signal.SIGKILL)

shards.SHARD_BYTES = tests.TWO_IMAGES
made = tests.cache(Path(cache), Path(model), tests.images_in(Path(root)))
sys.addaudithook(struck)
made.fill(0, 1, lambda: None, lambda count: None)
"""


@pytest.mark.parametrize(
    ("event", "ending", "written"),
    [
        ("os.rename", "*/latents/*/000003.safetensors", 3),  # a file is there under its temporary name
        pytest.param("open", "*/5.png", 2, marks=pytest.mark.slow),  # an image is read
        pytest.param("os.rename", "*/embeddings/*/000001.safetensors", 0, marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_leaves_what_another_goes_on_with(model, root, tmp_path, event, ending, written):
    given = [str(tmp_path / "cache"), str(model), str(root), event, ending]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *given], env=ONE_THREAD, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("[!.]*.safetensors")}
    assert sum(path.parent.parent.name == "latents" for path in there) == written
    filled(tmp_path / "cache", model, images_in(root))
    filled(tmp_path / "whole", model, images_in(root))
    assert files(tmp_path / "cache") == files(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == time for path, time in there.items())
