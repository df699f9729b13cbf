"""`diffkd distill` of Stable Diffusion 3 and Flux: caches, every method, students that open in stock."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import diffkd
from diffkd import methods
from tests import flow_pipelines
from tests.runs.adapters import assert_trained
from tests.runs.tiny import OF_LATENTS as CONFIG
from tests.runs.tiny import assert_same_runs, network, signal_at

ROOT = Path(__file__).parents[2]
CAPTIONS = ["a red ring", "a star above a square", "two crosses", "a small circle", "a ring"]
KINDS = ("sd3", "flux")
SEVERAL: dict[str, Any] = {"steps": [2, 1]}
ONE: dict[str, Any] = {"steps": 2}
METHODS: dict[str, dict[str, Any]] = {
    "adversarial": ONE,
    "consistency": SEVERAL,
    "dmd2": {**ONE, "fake_updates": 1, "gan": 1e-3},
    "f_distill": {**ONE, "fake_updates": 1},
    "feature": {},
    "imm": {**SEVERAL, "group": 2},
    "lcm": SEVERAL,
    "meanflow": SEVERAL,
    "output": {},
    "progressive": {"steps": [2]},
    "reflow": {"steps": [2], "pairs": 6, "pair_steps": 2},
    "regression": {"pairs": 6, "pair_steps": 2},
    "shortcut": SEVERAL,
    "sid": {**ONE, "fake_updates": 1},
    "tcm": SEVERAL,
}
UNFIT = {  # and why
    "denoising": "trains a teacher",
    "guidance": "the network has no place for the weight",
    "logits": "is of classifiers",
    "scm": "is of schedules that preserve variance",
}
BY_DEFAULT = ("dmd2",)


@pytest.fixture(scope="module", params=KINDS)
def work(request, tmp_path_factory):
    """A teacher, and a folder of captioned images."""
    work = tmp_path_factory.mktemp(request.param)
    flow_pipelines.teacher_and_images(work, request.param, CAPTIONS)
    return work


@pytest.fixture
def kind(work):
    return json.loads((work / "teacher" / "model_index.json").read_text())["_class_name"]


@pytest.fixture
def here(work, kind, tmp_path, monkeypatch):
    """Guided by two passes, or with one weight of an input baked in."""
    for name in ("teacher", "images"):
        (tmp_path / name).symlink_to(work / name)
    monkeypatch.chdir(tmp_path)
    config = json.loads(json.dumps(CONFIG))
    if kind == "FluxPipeline":
        config["teacher"]["guidance"] = config["method"].pop("guidance")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def stock_images(folder, prompts, seed, steps=None):
    """uint8 images of the stock pipeline, called as the student's card says."""
    card = json.loads((folder / "diffkd.json").read_text())
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompts, generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
        num_inference_steps=steps or card["steps"], output_type="np", **card["call"],
    ).images  # fmt: skip
    return np.rint(images * 255)


def test_a_run_from_captions_to_students(cli, here, kind):
    outcome = cli("distill", "run.yaml")
    assert outcome.code == 0, outcome.stderr
    cached = here / "run" / "cache"
    assert len([*cached.glob("latents/*/000000.safetensors")]) == 1
    (held,) = cached.glob("embeddings/*/000000.safetensors")
    tokens = 77 + 256 if kind == "StableDiffusion3Pipeline" else 512
    kept = load_file(held)["encoder_hidden_states"]
    assert kept.shape[0] >= 5 and kept.shape[1] == tokens
    folder = here / "run" / "students" / "2-steps"
    student = diffkd.load(folder)
    assert (student.guidance_baked_in, student.steps, student.guidance_range) == (3.0, 2, None)
    assert student.shape == (4, 8, 8)
    (ours,) = diffkd.generate(student, 2, prompts=CAPTIONS[:2], seed=5)
    assert np.abs(ours.numpy().astype(int) - stock_images(folder, CAPTIONS[:2], 5)).max() <= 1
    out = here / "one.npz"
    outcome = cli("sample", folder, "--prompt", CAPTIONS[0], "--seed", 5, "--out", out)
    assert outcome.code == 0, outcome.stderr
    assert np.abs(np.load(out)["arr_0"][0].astype(int) - ours.numpy()[0]).max() <= 1
    before, after = network(here / "teacher"), network(folder)
    assert any((before[key] != after[key]).any() for key in after)
    assert all(key in after or "guidance_embedder" in key for key in before)


def test_the_cache_holds_the_latents_that_stock_encodes(cli, here):
    """Shifted, then scaled."""
    assert cli("cache", "run.yaml").code == 0
    (file,) = (here / "run" / "cache").glob("latents/*/000000.safetensors")
    kept = load_file(file)
    vae = diffusers.AutoencoderKL.from_pretrained(here / "teacher", subfolder="vae")
    images = diffkd.data.Folder(kind="folder", path=here / "images", size=32).load()
    pixels = images.uint8(slice(0, 10)).float() / 127.5 - 1
    with torch.no_grad():
        encoded = vae.encode(pixels).latent_dist
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    assert torch.allclose(kept["mean"], (encoded.mean - shift) * scale, atol=1e-5)
    assert torch.allclose(kept["std"], encoded.std * scale, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "kind", "options"),
    [
        ("sd3/progressive", "sd3", {}), ("flux/progressive", "flux", {}),
        ("flux/schnell", "flux", {
            "guidance_embeds": False,
            "noise": flow_pipelines.scheduler("flux", shift=1.0, use_dynamic_shifting=False),
        }),
    ],
)  # fmt: skip
def test_the_configs_for_public_teachers_run(cli, tmp_path, monkeypatch, config, kind, options):
    """Two updates of every stage on tiny pipelines of their layout."""
    flow_pipelines.teacher_and_images(tmp_path, kind, CAPTIONS, **options)
    monkeypatch.chdir(tmp_path)
    changes = {
        "teacher.path": "teacher", "data.path": "images", "data.size": 32, "method.updates": 2,
        "training.batch_size": 4, "training.micro_batches": 2, "evaluation": None, "pictures": 0,
    }  # fmt: skip
    given = (f"{key}={json.dumps(value)}" for key, value in changes.items())
    outcome = cli("distill", ROOT / "configs" / f"{config}.yaml", *given)
    assert outcome.code == 0, outcome.stderr
    (students,) = tmp_path.glob("runs/*/students")
    folder = students / "2-steps"
    (ours,) = diffkd.generate(diffkd.load(folder), 2, prompts=CAPTIONS[:2], seed=5)
    assert np.abs(ours.numpy().astype(int) - stock_images(folder, CAPTIONS[:2], 5)).max() <= 1


def test_every_method_is_named_above():
    assert {*methods.names()} == {*METHODS, *UNFIT}


@pytest.mark.parametrize(
    "method", [m if m in BY_DEFAULT else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_methods_know_no_family(cli, here, method):
    """Two updates of each stage; stock draws what was made."""
    chain = [
        {"name": name, "updates": 2, "learning_rate": 1e-3, **METHODS[name]}
        for name in (["consistency"] if method == "tcm" else []) + [method]
    ]
    outcome = cli("distill", "run.yaml", f"method={json.dumps(chain)}", "pictures=0")
    assert outcome.code == 0, outcome.stderr
    for folder in (here / "run" / "students").iterdir():
        student = diffkd.load(folder)
        if student.steps is None:  # as its teacher
            continue
        steps = 1 if student.sampler == "renoise" else student.steps  # whose fresh noise stock has of its own
        (ours,) = diffkd.generate(student, 2, prompts=CAPTIONS[:2], seed=5, steps=steps)
        if student.sampler == "renoise" and student.steps != 1:  # whose grid is of its own number of steps
            continue
        assert np.abs(ours.numpy().astype(int) - stock_images(folder, CAPTIONS[:2], 5, steps)).max() <= 1


def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bits(cli, here, monkeypatch):
    assert cli("distill", "run.yaml", "out=whole", "pictures=0").code == 0
    with monkeypatch.context() as patch:
        signal_at(patch, "2-steps", 1, send=[signal.SIGTERM])
        assert cli("distill", "run.yaml", "out=broken", "pictures=0").code == 130
    assert cli("distill", "run.yaml", "out=broken", "pictures=0").code == 0
    assert_same_runs(here / "whole", here / "broken")


@pytest.mark.slow
def test_adapters(cli, here, kind, monkeypatch):
    """The prompt's part of Stable Diffusion 3's last block is thrown away, so its query learns nothing."""
    idle = ["transformer_blocks.1.attn.add_q_proj"] if kind == "StableDiffusion3Pipeline" else []
    assert_trained(cli, monkeypatch, here, idle)


def test_two_processes_distil_what_one_does(cli, here, launched):
    """The students and their cached latents, up to the order of a sum."""
    given = ("method.steps=[2]", "method.learning_rate=1e-3", "training.micro_batches=2", "pictures=0")
    assert cli("distill", "run.yaml", "out=one", *given).code == 0
    done = launched(2, "distill", "run.yaml", "out=two", *given)
    assert done.returncode == 0, done.stderr
    one, two = (network(here / out / "students" / "2-steps") for out in ("one", "two"))
    a, b = (torch.cat([value.double().flatten() for value in each.values()]) for each in (one, two))
    assert (a - b).norm() <= 1e-5 * a.norm()


def test_a_weight_that_is_an_input_stays_one(cli, here, kind):
    """Of students as of their teacher; what guides it twice is refused."""
    if kind != "FluxPipeline":
        outcome = cli("distill", "run.yaml", "teacher.guidance=3")
        assert outcome.code == 2 and "does not take its guidance as an input" in outcome.stderr
        return
    outcome = cli("distill", "run.yaml", "teacher.guidance=null", "method.guidance=3")
    assert outcome.code == 2 and "takes the weight as an input" in outcome.stderr
    assert "teacher.guidance" in outcome.stderr and len(outcome.stderr.splitlines()) == 1
    outcome = cli("distill", "run.yaml", "teacher.guidance=null", "method={name: guidance, range: [1, 5]}")
    assert outcome.code == 2 and "takes its weight as an input already" in outcome.stderr
    assert cli("distill", "run.yaml", "teacher.guidance=null", "method.steps=[2]").code == 0
    folder = here / "run" / "students" / "2-steps"
    student = diffkd.load(folder)
    assert student.guidance_range == [1.0, 5.0] and student.usual_guidance == 3.5
    (ours,) = diffkd.generate(student, 2, prompts=CAPTIONS[:2], seed=5)
    assert np.abs(ours.numpy().astype(int) - stock_images(folder, CAPTIONS[:2], 5)).max() <= 1
    (other,) = diffkd.generate(student, 2, prompts=CAPTIONS[:2], seed=5, guidance=1.0)
    assert (ours != other).any()
