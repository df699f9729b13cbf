"""`diffkd train` of a flow laid out as Stable Diffusion 3: from captioned shapes to a stock pipeline."""

from __future__ import annotations

import signal

import diffusers
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import diffkd
from diffkd.core.schedules import FlowSchedule, Shift
from diffkd.data.shapes import Shapes
from diffkd.models.new.sd3 import NewSD3
from diffkd.runs.latent_teacher.config import TrainSD3
from tests.runs.tiny import log, records, signal_at

CONFIG = {
    "out": "teacher",
    "data": {"kind": "shapes", "count": 64},
    "model": {
        "kind": "sd3",
        "autoencoder": {"channels": [8, 8, 8], "norm_groups": 4},
        "text": {"width": 16, "heads": 2, "layers": 2},
        "transformer": {"width": 16, "heads": 2, "layers": 2},
    },
    "schedule": {"shift": 3.0},
    "autoencoding": {"updates": 3, "warmup": 0},
    "denoising": {"updates": 3, "warmup": 0},
    "training": {"batch_size": 8, "log_every": 1, "checkpoint_every": 1},
    "evaluation": {
        "features": "shapes", "metrics": ["fid", "prompt_accuracy"], "samples": 32, "teacher_steps": [4],
    },
    "pictures": 4,
}  # fmt: skip
PROMPTS = ["a small red ring above a large blue square", "a star"]
PARTS = {
    "transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
    "text_encoder_2": "model",
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def pixels_by_stock(folder, steps, guidance):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    images = pipeline(
        PROMPTS, num_inference_steps=steps, guidance_scale=guidance, output_type="np", generator=generators
    ).images
    return pipeline, np.rint(images * 255)


def test_a_teacher_is_trained_and_distilled(cli, here):
    outcome = cli("train", "teacher.yaml")
    assert outcome.code == 0, outcome.stderr
    (record,) = records(here / "teacher")
    assert 0 <= record["prompt_accuracy"] <= 1 and record["fid"] > 0 and record["nfe"] == 8
    folder = here / "teacher" / "teacher"
    teacher = diffkd.load(folder)
    assert (teacher.prediction, teacher.schedule.law) == ("flow", Shift(3.0))
    for steps, guidance in ((4, 3.0), (1, 1.0)):
        pipeline, theirs = pixels_by_stock(folder, steps, guidance)
        (ours,) = diffkd.generate(teacher, 2, prompts=PROMPTS, steps=steps, guidance=guidance)
        assert theirs.std() > 5 and np.abs(ours.numpy().astype(int) - theirs).max() <= 1
    assert type(pipeline).__name__ == "StableDiffusion3Pipeline" and pipeline.text_encoder_3 is None
    # the encoders are not one, and its latents have zero mean and unit spread
    tables = [part.get_input_embeddings().weight for part in (pipeline.text_encoder, pipeline.text_encoder_2)]
    assert (tables[0] != tables[1]).any()
    pixels = torch.from_numpy(Shapes(kind="shapes", count=64).load().pixels)
    mean, _ = teacher.codec.moments(pixels / 127.5 - 1)
    assert abs(mean.mean().item()) < 1e-2 and mean.std().item() == pytest.approx(1, rel=0.01)
    assert pipeline.vae.config.shift_factor != 0
    # and it is distilled
    content = {
        "out": "run", "teacher": {"train": "teacher.yaml"}, "data": CONFIG["data"],
        "method": {"name": "progressive", "steps": [2], "updates": 2, "guidance": 3.0},
        "training": CONFIG["training"], "evaluation": CONFIG["evaluation"], "pictures": 4,
        "cache": "teacher/cache",
    }  # fmt: skip
    (here / "distill.yaml").write_text(yaml.safe_dump(content))
    outcome = cli("distill", "distill.yaml")
    assert outcome.code == 0, outcome.stderr
    assert [(r["model"], r["nfe"]) for r in records(here / "run")] == [("teacher", 8), ("2-steps", 2)]
    student = here / "run" / "students" / "2-steps"
    (ours,) = diffkd.generate(diffkd.load(student), 2, prompts=PROMPTS)
    _, theirs = pixels_by_stock(student, 2, 1.0)
    assert np.abs(ours.numpy().astype(int) - theirs).max() <= 1


def test_what_learns_is_what_is_saved(cli, here):
    """Network and text encoders together, given tokens, draw what the pipeline does of the prompts."""
    images = Shapes(kind="shapes", count=64).load()
    model = NewSD3.model_validate(CONFIG["model"])
    torch.manual_seed(0)
    tokens = model.conditioner(images)
    flow = FlowSchedule(Shift(3.0), handed=False)
    learning = model.build((4, 8, 8), images, tokens, flow, "flow").eval()
    for parameter in learning.parameters():  # it begins as zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    assert cli("train", "teacher.yaml", "evaluation=null", "pictures=0", "denoising.updates=1").code == 0
    codec = diffkd.load(here / "teacher" / "teacher").codec
    model.save(learning, codec, tokens, images, here / "made")
    made = diffkd.load(here / "made")
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.9], dtype=torch.float64)
    with torch.no_grad():
        ours = learning.output(x, t, **tokens.embed(PROMPTS))
        theirs = made.output(x, t, **made.conditioner.embed(PROMPTS))
    assert theirs.std() > 0.1 and torch.allclose(ours, theirs, atol=1e-5)


def test_stopped_and_resumed_it_ends_with_the_same_bits(cli, here, monkeypatch):
    given = ("train", "teacher.yaml", "evaluation=null", "pictures=0")
    assert cli(*given, "out=whole").code == 0
    with monkeypatch.context() as patch:
        signal_at(patch, "denoising", 1, send=[signal.SIGTERM])
        assert cli(*given, "out=broken").code == 130
    assert cli(*given, "out=broken").code == 0
    for part, stem in PARTS.items():
        one, other = (
            load_file(here / out / "teacher" / part / f"{stem}.safetensors") for out in ("whole", "broken")
        )
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert log(here / "whole") == log(here / "broken")


def test_a_new_transformer_begins_as_zero():
    torch.manual_seed(0)
    network = NewSD3.model_validate(CONFIG["model"]).network((4, 8, 8))
    with torch.no_grad():
        made = network(
            torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32), torch.randn(2, 32), torch.ones(2)
        ).sample
    assert made.abs().max() == 0


def test_it_learns_a_flow_unless_it_is_told_otherwise():
    config = TrainSD3.model_validate({**CONFIG, "denoising": {"updates": 7, "std": 0.5}})
    found = config.denoising
    assert (found.updates, found.weight, found.times, found.mean, found.std) == (
        7,
        "flow",
        "log_normal",
        0,
        0.5,
    )
    assert TrainSD3.model_validate({**CONFIG, "denoising": {}}).denoising.std == 1.0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("data={kind: digits}",), ["digits", "no captions"]),
        (("data.side=34",), ["34x34", "divide by 4"]),
        (("model.transformer.patch=3",), ["patch 3 does not divide", "use 1, 2, 4, 8"]),
        (("schedule.shift=0",), ["schedule.shift is 0", "greater than 0"]),
        (("denoising.label_dropout=0",), ["label_dropout 0", "guidance 3", "use 0.1, or guidance 1"]),
        (("prediction=v_prediction",), ["prediction is 'v_prediction'", "flow"]),
    ],
)
def test_what_is_refused(cli, here, changes, says):
    outcome = cli("train", "teacher.yaml", *changes)
    assert outcome.code == 2 and all(word in outcome.stderr for word in says), outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1 and not (here / "teacher").exists()
