"""`diffkd train` of a DiT: from labelled images, grey or in colour, to a stock pipeline and a student."""

from __future__ import annotations

import json
import signal
import warnings

import diffusers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import diffkd
from diffkd.data.digits import Digits
from diffkd.models.new.dit import NewDiT
from tests.runs.tiny import log, records, signal_at

CONFIG = {
    "out": "teacher",
    "data": {"kind": "digits"},
    "model": {
        "kind": "dit",
        "autoencoder": {"channels": [8, 8], "norm_groups": 4},
        "transformer": {"width": 16, "layers": 2, "heads": 2},
    },
    "schedule": {"num_train_timesteps": 64},
    "autoencoding": {"updates": 3, "warmup": 0},
    "denoising": {"updates": 3, "warmup": 0},
    "training": {"batch_size": 8, "log_every": 1, "checkpoint_every": 1},
    "evaluation": {"samples": 32, "teacher_steps": [4]},
    "pictures": 4,
}
COLOURS = {"kind": "folder", "path": "images", "size": 8, "channels": 3}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def pixels_by_stock(folder, labels, steps, **call):
    """uint8 (B, H, W, C) of the stock pipeline."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(len(labels))]
    images = pipeline(
        labels, generator=generators, num_inference_steps=steps, output_type="np", **call
    ).images
    return pipeline, np.rint(images * 255)


def test_a_teacher_of_grey_images_is_trained_and_distilled(cli, here):
    outcome = cli("train", "teacher.yaml")
    assert outcome.code == 0, outcome.stderr
    (record,) = records(here / "teacher")
    assert record["fid"] > 0 and record["nfe"] == 4
    assert {line["stage"] for line in log(here / "teacher")} == {"autoencoder", "denoising"}
    folder = here / "teacher" / "teacher"
    teacher = diffkd.load(folder)
    assert (teacher.num_classes, teacher.null_label, teacher.codec.image_channels) == (10, 10, 1)
    (ours,) = diffkd.generate(teacher, 3, labels=[7, 0, 1], steps=4)
    pipeline, theirs = pixels_by_stock(folder, [7, 0, 1], 4, guidance_scale=1.0)
    assert type(pipeline).__name__ == "DiTPipeline" and theirs.shape == (3, 8, 8, 1)
    assert theirs.std() > 5 and np.abs(ours.numpy().astype(int) - theirs).max() <= 1
    assert pipeline.get_label_ids(["7", "0"]) == [7, 0]
    card = json.loads((folder / "diffkd.json").read_text())
    assert card["classes"] == [str(digit) for digit in range(10)] and sum(card["class_counts"]) == 1797
    # its latents have unit spread, of the first images
    mean, _ = teacher.codec.moments(torch.from_numpy(Digits(kind="digits").load().pixels[:1024]) / 127.5 - 1)
    assert mean.shape == (1024, 4, 4, 4) and mean.std().item() == pytest.approx(1, rel=1e-3)
    # and it is distilled
    content = {
        "out": "run", "teacher": {"train": "teacher.yaml"}, "data": {"kind": "digits"},
        "method": {"name": "progressive", "steps": [2], "updates": 2, "guidance": 3.0},
        "training": CONFIG["training"], "evaluation": CONFIG["evaluation"], "pictures": 4,
    }  # fmt: skip
    (here / "distill.yaml").write_text(yaml.safe_dump(content))
    outcome = cli("distill", "distill.yaml")
    assert outcome.code == 0, outcome.stderr
    assert [(r["model"], r["nfe"]) for r in records(here / "run")] == [("teacher", 8), ("2-steps", 2)]
    student = here / "run" / "students" / "2-steps"
    (ours,) = diffkd.generate(diffkd.load(student), 2, labels=[3, 9])
    _, theirs = pixels_by_stock(student, [3, 9], 2, guidance_scale=1.0)
    assert np.abs(ours.numpy().astype(int) - theirs).max() <= 1
    # a student that is measured by the stock code has the same FID
    outcome = cli("evaluate", student, "--reference", "digits", "--samples", 32, "--sampler", "stock")
    assert outcome.code == 0, outcome.stderr


def test_one_grey_image_is_a_picture_of_one_band(cli, here):
    """Which the stock pipeline makes of one channel, by the image's own size."""
    assert cli("train", "teacher.yaml", "evaluation=null", "pictures=0").code == 0
    pipeline = diffusers.DiffusionPipeline.from_pretrained(here / "teacher" / "teacher")
    pipeline.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of diffusers' call of Pillow
        (image,) = pipeline([3], num_inference_steps=1, guidance_scale=1.0).images
    assert (image.mode, image.size) == ("L", (8, 8))


@pytest.mark.parametrize("stage", ["autoencoder", "denoising"])
def test_stopped_and_resumed_it_ends_with_the_same_bits(cli, here, monkeypatch, stage):
    """Labels are dropped by the update's own numbers, and not by the network."""
    given = ("train", "teacher.yaml", "evaluation=null", "pictures=0", "denoising.label_dropout=0.5")
    assert cli(*given, "out=whole").code == 0
    with monkeypatch.context() as patch:
        signal_at(patch, stage, 1, send=[signal.SIGTERM])
        assert cli(*given, "out=broken").code == 130
    torch.manual_seed(5)
    assert cli(*given, "out=broken").code == 0
    for part in ("transformer", "vae"):
        one, other = (
            load_file(here / out / "teacher" / part / "diffusion_pytorch_model.safetensors")
            for out in ("whole", "broken")
        )
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert log(here / "whole") == log(here / "broken")


def test_images_in_colour(cli, here, monkeypatch):
    """Of two classes, by the names of their folders."""
    rng = np.random.default_rng(0)
    for number in range(12):
        place = here / "images" / ("cat" if number % 2 else "dog, hound")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(place / f"{number}.png")
    outcome = cli(
        "train", "teacher.yaml", f"data={json.dumps(COLOURS)}", "evaluation=null", "pictures=0",
        "model.autoencoder.channels=[8]", "training.batch_size=4",
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    pipeline, theirs = pixels_by_stock(here / "teacher" / "teacher", [1, 0], 4, guidance_scale=1.0)
    assert theirs.shape == (2, 8, 8, 3) and pipeline.transformer.config.sample_size == 8
    assert pipeline.labels == {"cat": 0, "dog": 1, "hound": 1}
    (ours,) = diffkd.generate(diffkd.load(here / "teacher" / "teacher"), 2, labels=[1, 0], steps=4)
    assert np.abs(ours.numpy().astype(int) - theirs).max() <= 1


def test_a_new_transformer_begins_as_zero_and_its_blocks_as_the_identity():
    """adaLN-Zero: whatever it is given."""
    torch.manual_seed(0)
    model = NewDiT(kind="dit", transformer={"width": 16, "layers": 3, "heads": 2, "patch": 1})
    network = model.network((4, 4, 4), 10).eval()
    x, time, labels = torch.randn(2, 4, 4, 4), torch.tensor([3.0, 60.0]), torch.tensor([1, 10])
    tokens = torch.randn(2, 16, 16)
    with torch.no_grad():
        assert network(x, time, labels).sample.abs().max() == 0
        for block in network.transformer_blocks:
            assert torch.equal(block(tokens, timestep=time, class_labels=labels), tokens)
    again = model.network((4, 4, 4), 10)
    assert (again.pos_embed.proj.weight != network.pos_embed.proj.weight).any()  # all else is random


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("data={kind: folder, path: plain, size: 8}",), ["has no labels", "leave out model.kind"]),
        (("model.transformer.patch=3",), ["patch 3 does not divide", "latents, 4; use 1, 2, 4"]),
        (("model.autoencoder.channels=[8,8,8,8,8]",), ["halve 4 times", "8x8 do not divide by 16"]),
        (("model.transformer.heads=3",), ["heads 3", "width 16"]),
        (("model.transformer.width=18",), ["model.transformer.width is 18", "multiple of 4"]),
        (("model.transformer.deep=3",), ["model.transformer.deep", "unknown"]),
        (("denoising.label_dropout=0",), ["label_dropout 0", "use 0.1"]),
        (("evaluation.metrics=[fid,agreement]",), ["agreement", "diffkd distill"]),
        (("model.kind=dti",), ["model.kind is 'dti'", "text_to_image, dit"]),
    ],
)
def test_what_is_refused(cli, here, changes, says):
    (here / "plain").mkdir()
    Image.new("RGB", (8, 8)).save(here / "plain" / "0.png")
    outcome = cli("train", "teacher.yaml", *changes)
    assert outcome.code == 2 and all(word in outcome.stderr for word in says), outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1 and not (here / "teacher").exists()


def test_images_in_colour_are_refused_for_a_grey_teacher(cli, here):
    assert cli("train", "teacher.yaml", "evaluation=null", "pictures=0").code == 0
    for label in range(2):
        (here / "images" / str(label)).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(here / "images" / str(label) / "0.png")
    content = {
        "out": "run", "teacher": {"path": "teacher/teacher"}, "data": COLOURS, "evaluation": None,
        "method": {"name": "progressive", "steps": [2], "updates": 2}, "pictures": 0,
    }  # fmt: skip
    (here / "distill.yaml").write_text(yaml.safe_dump(content))
    outcome = cli("distill", "distill.yaml")
    assert (
        outcome.code == 2
        and "makes grey images" in outcome.stderr
        and "set data.channels to 1" in outcome.stderr
    )
    assert cli("distill", "distill.yaml", "data.channels=1", "training.batch_size=2").code == 0
