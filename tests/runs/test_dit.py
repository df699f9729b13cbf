"""`diffkd distill` of a DiT: latents cached and labels beside them, students that open in stock."""

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
from tests import dit
from tests.refusals import refuse
from tests.runs.adapters import assert_trained
from tests.runs.tiny import OF_LATENTS as CONFIG
from tests.runs.tiny import assert_same_runs, network, signal_at

ROOT = Path(__file__).parents[2]
SEVERAL: dict[str, Any] = {"steps": [2, 1]}
ONE: dict[str, Any] = {"steps": 2}
METHODS: dict[str, dict[str, Any]] = {
    "adversarial": ONE,
    "consistency": SEVERAL,
    "dmd2": {**ONE, "fake_updates": 1, "gan": 1e-3},
    "f_distill": {**ONE, "fake_updates": 1},
    "feature": {},
    "imm": {**SEVERAL, "group": 2},
    "lcm": {**SEVERAL, "guidance": 3.0},
    "meanflow": SEVERAL,
    "output": {},
    "progressive": {"steps": [2]},
    "reflow": {"steps": [2], "pairs": 6, "pair_steps": 2},
    "regression": {"pairs": 6, "pair_steps": 2},
    "scm": SEVERAL,
    "shortcut": SEVERAL,
    "sid": {**ONE, "fake_updates": 1},
    "tcm": SEVERAL,
}
UNFIT = {  # and why
    "denoising": "trains a teacher",
    "guidance": "the network has no input for the weight",
    "logits": "is of classifiers",
}
BY_DEFAULT = ("progressive", "consistency", "dmd2", "meanflow", "regression")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A v-prediction teacher of three classes, and a folder of images of each."""
    work = tmp_path_factory.mktemp("dit")
    dit.teacher_and_images(work)
    return work


@pytest.fixture
def here(work, tmp_path, monkeypatch):
    for name in ("teacher", "images"):
        (tmp_path / name).symlink_to(work / name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def stock_images(folder, labels, seed):
    """uint8 images of the stock pipeline, called as the student's card says."""
    card = json.loads((folder / "diffkd.json").read_text())
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(labels))]
    images = pipeline(
        labels, generator=generators, num_inference_steps=card["steps"], output_type="np", **card["call"]
    ).images
    return np.rint(images * 255)


def test_a_run_from_images_to_students(cli, here):
    outcome = cli("distill", "run.yaml")
    assert outcome.code == 0, outcome.stderr
    assert "a DiTPipeline with DDIMScheduler" in outcome.stdout and "3 classes" in outcome.stdout
    cached = here / "run" / "cache"
    assert len([*cached.glob("latents/*/000000.safetensors")]) == 1 and not (cached / "embeddings").exists()
    assert (here / "run" / "samples" / "2-steps.png").exists()
    folder = here / "run" / "students" / "2-steps"
    student = diffkd.load(folder)
    assert (student.guidance_baked_in, student.steps) == (3.0, 2)
    assert (student.num_classes, student.null_label) == (3, 3)
    (ours,) = diffkd.generate(student, 3, labels=[2, 0, 1], seed=5)
    assert np.abs(ours.numpy().astype(int) - stock_images(folder, [2, 0, 1], 5)).max() <= 1
    before, after = network(here / "teacher"), network(folder)
    assert before.keys() == after.keys() and any((before[key] != after[key]).any() for key in before)


def test_the_cache_holds_the_latents_that_stock_encodes(cli, here):
    """Scaled; the labels are those of the folders."""
    assert cli("cache", "run.yaml").code == 0
    (file,) = (here / "run" / "cache").glob("latents/*/000000.safetensors")
    kept = load_file(file)
    vae = diffusers.AutoencoderKL.from_pretrained(here / "teacher", subfolder="vae")
    images = diffkd.data.Folder(kind="folder", path=here / "images", size=32).load()
    pixels = images.uint8(slice(0, 12)).float() / 127.5 - 1
    with torch.no_grad():
        encoded = vae.encode(pixels).latent_dist
    scale = vae.config.scaling_factor
    assert torch.allclose(kept["mean"], encoded.mean * scale, atol=1e-5)
    assert torch.allclose(kept["std"], encoded.std * scale, atol=1e-5)
    assert images.labels.tolist() == sorted(images.labels.tolist()) and images.num_classes == 3


def test_the_config_for_a_dit_runs(cli, tmp_path, monkeypatch, work):
    """Two updates of every stage, of the epsilon teacher that it is for."""
    dit.pipeline(classes=3).save_pretrained(tmp_path / "teacher", safe_serialization=True)
    monkeypatch.chdir(tmp_path)
    config = ROOT / "configs" / "dit" / "progressive.yaml"
    changes = {
        "teacher.path": "teacher", "data.path": str(work / "images"), "data.size": 32, "method.updates": 2,
        "method.updates_v": 2, "training.batch_size": 4, "training.micro_batches": 2, "evaluation": None,
        "pictures": 0,
    }  # fmt: skip
    outcome = cli("distill", config, *(f"{key}={json.dumps(value)}" for key, value in changes.items()))
    assert outcome.code == 0, outcome.stderr
    for steps in (8, 4, 2, 1):
        folder = tmp_path / "runs/dit-progressive/students" / f"{steps}-steps"
        (ours,) = diffkd.generate(diffkd.load(folder), 2, labels=[2, 1], seed=5)
        assert np.abs(ours.numpy().astype(int) - stock_images(folder, [2, 1], 5)).max() <= 1


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
        steps = {"steps": 1} if student.sampler == "renoise" else {}  # whose fresh noise stock has of its own
        (ours,) = diffkd.generate(student, 2, labels=[2, 0], seed=5, **steps)
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        theirs = pipeline(
            [2, 0], generator=[torch.Generator().manual_seed(5 + i) for i in range(2)], output_type="np",
            num_inference_steps=steps.get("steps", student.steps), guidance_scale=1.0,
        ).images  # fmt: skip
        assert np.abs(ours.numpy().astype(int) - np.rint(theirs * 255)).max() <= 1


@pytest.mark.parametrize(
    "changes", [("method.steps=[2]",), ("method={name: meanflow, steps: [2], updates: 4}",)]
)
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bits(cli, here, monkeypatch, changes):
    assert cli("distill", "run.yaml", "out=whole", "pictures=0", *changes).code == 0
    with monkeypatch.context() as patch:
        signal_at(patch, "2-steps", 1, send=[signal.SIGTERM])
        assert cli("distill", "run.yaml", "out=broken", "pictures=0", *changes).code == 130
    assert cli("distill", "run.yaml", "out=broken", "pictures=0", *changes).code == 0
    assert_same_runs(here / "whole", here / "broken")


def test_adapters(cli, here, monkeypatch):
    assert_trained(cli, monkeypatch, here)


def test_two_processes_distil_what_one_does(cli, here, launched):
    """The students and their cached latents, up to the order of a sum."""
    given = ("method.steps=[2]", "method.learning_rate=1e-3", "training.micro_batches=2", "pictures=0")
    assert cli("distill", "run.yaml", "out=one", *given).code == 0
    done = launched(2, "distill", "run.yaml", "out=two", *given)
    assert done.returncode == 0, done.stderr
    one, two = (network(here / out / "students" / "2-steps") for out in ("one", "two"))
    a, b = (torch.cat([value.double().flatten() for value in each.values()]) for each in (one, two))
    assert (a - b).norm() <= 1e-5 * a.norm()


def test_a_run_without_images(cli, here):
    """Its data is what the teacher draws of its classes in turn."""
    data = "data={kind: none, draws: 6, steps: 3, guidance: 2}"
    outcome = cli("distill", "run.yaml", data, "spread_every=1")
    assert outcome.code == 0, outcome.stderr
    assert "6 that the teacher draws in 3 steps, guidance 2" in outcome.stdout
    stored = load_file(here / "run/pairs/data/000000.safetensors")
    assert stored["x0"].shape == (6, 4, 8, 8) and {*stored["labels"].tolist()} == {0, 1, 2}


def test_a_student_is_measured_by_either_code(cli, here):
    """Drawn by diffkd, or by the stock pipeline at the arguments of its card."""
    assert cli("distill", "run.yaml", "pictures=0", "method.steps=[2]").code == 0
    student = here / "run" / "students" / "2-steps"
    given = ("--reference", here / "images", "--features", "shapes", "--samples", 12)
    found = {}
    for sampler in ("ddim", "stock"):
        outcome = cli("evaluate", student, *given, "--sampler", sampler, "--out", f"{sampler}.json")
        assert outcome.code == 0, outcome.stderr
        found[sampler] = json.loads((here / f"{sampler}.json").read_text())
    assert found["stock"]["protocol"]["pipeline"]["guidance_scale"] == 1.0
    assert found["stock"]["fid"] == pytest.approx(found["ddim"]["fid"], rel=1e-2)


def test_what_stock_guides_by_a_label_of_its_own_is_not_measured_so(cli, here):
    refuse(
        cli, here, "evaluate", "teacher", "--reference", "images", "--features", "shapes", "--sampler",
        "stock", "--samples", 4, "--steps", 2, says=["3 classes", "guides with label 1000 as no class"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("data.size=64",), "images of 64x64 are not of the one size"),
        (("data={kind: prompts, path: run.yaml}",), "and teacher does not; use kind none"),
        (("method={name: feature, blocks: [mid_block]}",), "does not have; it has transformer_blocks.0, "),
        (("method={name: guidance, range: [1, 5]}",), "DiTTransformer2DModel"),
        (("student={kind: narrow, ratio: 0.5}",), "narrow does not support a DiTTransformer2DModel"),
        (
            ("student={kind: drop_blocks, blocks: [transformer_blocks.0]}",),
            "drops transformer_blocks.0, which has to stay",
        ),
        (("teacher.null_label=1",), "null_label 1 is not that of this model, which is 3"),
        (
            ("method={name: meanflow}", "training.gradient_checkpointing=true"),
            "gradient_checkpointing does not work for a DiTTransformer2DModel that takes the length",
        ),
    ],
)
def test_what_does_not_fit(cli, here, changes, says):
    outcome = cli("distill", "run.yaml", *changes)
    assert outcome.code == 2 and says in outcome.stderr, outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def test_gradients_of_blocks_computed_again_are_the_same(cli, here):
    for out, given in (("one", "false"), ("two", "true")):
        outcome = cli(
            "distill", "run.yaml", f"out={out}", f"training.gradient_checkpointing={given}", "pictures=0",
            "method.learning_rate=1e-2",
        )  # fmt: skip
        assert outcome.code == 0, outcome.stderr
    one, two = (network(here / out / "students" / "2-steps") for out in ("one", "two"))
    assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)
    teacher = network(here / "teacher")
    assert max((one[key] - teacher[key]).abs().max() for key in one) > 1e-3


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("--height", 64, "--width", 64), "images of 64x64 are not of the one size"),
        (("--prompt", "a cat"), "prompt"),
        (("--classes", "3"), "class label 3 is out of range; this model has labels 0 to 2"),
    ],
)
def test_what_sample_refuses(cli, here, asked, says):
    refuse(cli, here, "sample", "teacher", "-n", 1, "--steps", 1, "--out", "out", *asked, says=says)


def test_the_teacher_is_drawn_guided(cli, here):
    """By its own label for no class; the weight is not without effect."""
    drawn = []
    for weight in (1, 4):
        out = f"{weight}.npz"
        outcome = cli(
            "sample", "teacher", "-n", 3, "--steps", 2, "--out", out, "--guidance", weight, "--seed", 2
        )
        assert outcome.code == 0, outcome.stderr
        drawn.append(np.load(out)["arr_0"].astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() > 2
