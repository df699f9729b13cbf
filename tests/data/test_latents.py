"""The cache of latents and embeddings: what it holds, what it draws, resumed and told apart."""

from __future__ import annotations

import contextlib
import dataclasses
import threading

import numpy as np
import pytest
import torch

from diffkd.data import shards
from diffkd.data.images import Images
from diffkd.data.latents import LatentCache
from diffkd.errors import UserError
from diffkd.models import loading
from diffkd.runs import latents as running
from tests import text_to_image

CAPTIONS = ["a red ring", "a star", "a red ring", "", "two stars"]


@pytest.fixture(scope="module", params=["sd", "xl"])
def model(request, tmp_path_factory):
    work = tmp_path_factory.mktemp(request.param)
    made = text_to_image.pipeline(work / "parts", xl=request.param == "xl")
    made.save_pretrained(work / "model", safe_serialization=True)
    return work / "model"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Two images a file, and of embeddings one."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 2 * 2 * 4 * 4 * 64)


def images(**changes):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    return dataclasses.replace(Images("five", pixels, captions=CAPTIONS), **changes)


def cache(folder, model, given=None, **changes):
    denoiser = loading.load(model)
    return LatentCache(folder, given or images(**changes), denoiser.codec, denoiser.conditioner)


def filled(folder, model, **changes):
    made = cache(folder, model, **changes)
    made.fill(0, 1, lambda: None, lambda count: None)
    assert made.left() == 0
    return made


def test_a_batch_is_drawn_of_the_latents_with_its_captions_embedding(model, tmp_path):
    made, denoiser = filled(tmp_path, model), loading.load(model)
    assert len(list((tmp_path / "latents").glob("*/*.safetensors"))) == 3
    x0, cond = made.batch(64, torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(0)
    indices = torch.randint(5, (64,), generator=rng)
    assert torch.equal(made.indices(64, torch.Generator().manual_seed(0)), indices)
    mean, std = denoiser.codec.moments(torch.from_numpy(images().pixels).float() / 127.5 - 1)
    expected = mean[indices] + std[indices] * torch.randn(64, *mean.shape[1:], generator=rng)
    assert torch.allclose(x0, expected, atol=1e-5)
    embedded = denoiser.conditioner.embed([CAPTIONS[i] for i in indices], size=(32, 32))
    assert cond.keys() == embedded.keys()
    for key, value in embedded.items():
        assert torch.allclose(cond[key], value, atol=1e-5)
    for key, value in denoiser.conditioner.null().items():
        assert torch.allclose(made.null()[key], value, atol=1e-6)


def test_a_damaged_file_is_named(model, tmp_path):
    """Of rows, and what stands for no prompt."""
    filled(tmp_path, model)
    for name, read in (
        ("embeddings/*/null", lambda made: made.null()),
        ("embeddings/*/000000", lambda made: made.cond(torch.tensor([0]))),
        ("latents/*/000000", lambda made: made.readable),
    ):
        (path,) = tmp_path.glob(f"{name}.safetensors")
        path.write_bytes(path.read_bytes()[:50])
        with pytest.raises(UserError, match=rf"{path.name} cannot be read \(.*delete it, and the same"):
            read(cache(tmp_path, model))


def test_mirror_images_have_latents_of_their_own(model, tmp_path):
    made, denoiser = filled(tmp_path, model, flip=True), loading.load(model)
    x0, _ = made.batch(200, torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(0)
    indices, flipped = torch.randint(5, (200,), generator=rng), torch.rand(200, generator=rng) < 0.5
    pixels = torch.from_numpy(images().pixels).float()[indices] / 127.5 - 1
    pixels[flipped] = pixels[flipped].flip(-1)
    mean, std = denoiser.codec.moments(pixels)
    assert torch.allclose(x0, mean + std * torch.randn(mean.shape, generator=rng), atol=1e-5)


def test_it_is_filled_by_several_processes_and_resumed(model, tmp_path):
    """Each its files, the same whoever makes them; what is there is not made again."""
    filled(tmp_path / "one", model)
    barrier = threading.Barrier(2, timeout=600)
    processes = [
        threading.Thread(target=one.fill, args=(rank, 2, barrier.wait, lambda count: None))
        for rank, one in enumerate([cache(tmp_path / "two", model) for _ in range(2)])
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    for lost in ("latents/*/000001", "embeddings/*/null"):
        (found,) = (tmp_path / "two").glob(f"{lost}.safetensors")
        found.unlink()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").rglob("*.safetensors")}
    counted, again = [], cache(tmp_path / "two", model)
    assert again.left() == 3
    again.fill(0, 1, lambda: None, counted.append)
    assert sum(counted) == 2 and all(path.stat().st_mtime_ns == time for path, time in kept.items())
    for path in (tmp_path / "one").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_a_process_that_is_ahead_waits_until_all_know_what_is_missing(model, tmp_path):
    """Else the last missing file may be there before another process looks, and they part ways."""
    filled(tmp_path, model)
    (null,) = tmp_path.glob("embeddings/*/null.safetensors")
    null.unlink()
    barrier, ahead, made = threading.Barrier(2, timeout=60), threading.Event(), []

    class Accelerator:
        num_processes, is_main_process, device = 2, False, torch.device("cpu")

        def __init__(self, rank):
            self.process_index = rank

        def wait_for_everyone(self):
            ahead.set()
            barrier.wait()

    def fill(rank):
        if rank:
            ahead.wait()  # the first is at its first barrier
        items = contextlib.nullcontext(lambda count: None)
        made.append(running.fill(cache(tmp_path, model), Accelerator(rank), lambda title, total: items))

    processes = [threading.Thread(target=fill, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert made == [1, 1] and null.exists()


def test_encoders_and_autoencoder_are_never_in_memory_together(model, tmp_path, monkeypatch):
    made = cache(tmp_path, model)
    moments, kind = type(made.codec).moments, type(made.codec)

    def checked(self, given):
        assert "networks" not in made.conditioner.__dict__
        return moments(self, given)

    monkeypatch.setattr(kind, "moments", checked)
    made.fill(0, 1, lambda: None, lambda count: None)
    assert "network" not in made.codec.__dict__ and "networks" not in made.conditioner.__dict__
    made.batch(4, torch.Generator())
    assert "network" not in made.codec.__dict__ and "networks" not in made.conditioner.__dict__


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"flip": True}, 5),
        ({"captions": CAPTIONS[::-1]}, 4 + 1),
        ({"pixels": images().pixels[::-1].copy()}, 5),
    ],
)
def test_others_lie_beside_them(model, tmp_path, changes, left):
    first = filled(tmp_path, model)
    again = cache(tmp_path, model, **changes)
    assert again.left() == left and any(kept.alone() for kept in again.kept())
    again.fill(0, 1, lambda: None, lambda count: None)
    assert cache(tmp_path, model).left() == again.left() == first.left() == 0


def test_of_other_encoders(tmp_path):
    """Told apart by their weights, wherever they lie."""
    for name, seed in (("a", 0), ("b", 1), ("c", 0)):
        made = text_to_image.pipeline(tmp_path / name / "parts", seed=seed)
        made.save_pretrained(tmp_path / name / "model", safe_serialization=True)
    filled(tmp_path / "cache", tmp_path / "a" / "model")
    other = cache(tmp_path / "cache", tmp_path / "b" / "model")
    assert other.left() == 5 + 4 + 1 and all(kept.alone() for kept in other.kept())
    assert cache(tmp_path / "cache", tmp_path / "c" / "model").left() == 0


def test_grey_images_are_encoded_as_colours(model, tmp_path):
    grey = Images("grey", images().pixels[:, :1], captions=CAPTIONS)
    made, denoiser = cache(tmp_path, model, grey), loading.load(model)
    made.fill(0, 1, lambda: None, lambda count: None)
    mean, _ = denoiser.codec.moments(torch.from_numpy(grey.pixels).float().expand(-1, 3, -1, -1) / 127.5 - 1)
    assert torch.allclose(made._rows(3, "mean"), mean[3], atol=1e-5)
