"""Runs of EDM teachers: trained, distilled, and drawn by stock diffusers alone."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import yaml

import diffkd
from diffkd.core.schedules import EDMSchedule, Preconditioned
from diffkd.data.digits import Digits
from diffkd.methods.base import Batch, Step
from diffkd.runs import config_files
from diffkd.runs.train import untrained_teacher
from tests import edm

CONFIGS = Path(diffkd.__file__).parents[1] / "configs"
SHORT = {"training.batch_size": 8, "evaluation": None, "pictures": 0}
TINY = {"model.channels": [8, 16], "denoising.updates": 2, "denoising.warmup": 0}


def given(*changes):
    return [f"{key}={json.dumps(value)}" for change in changes for key, value in change.items()]


def stock_images(folder, steps, labels):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(5 + i) for i in range(len(labels))]
    images = pipeline(
        len(labels), class_labels=labels, generator=generators, num_inference_steps=steps, output_type="np"
    ).images
    assert type(pipeline.scheduler) is diffusers.EDMEulerScheduler
    return np.rint(images * 255).astype(int)


def test_the_digits_configs(cli, tmp_path, monkeypatch):
    """Two updates of the teacher and of each stage; the students are drawn by stock."""
    monkeypatch.chdir(tmp_path)
    teacher = yaml.safe_load((CONFIGS / "digits/edm-teacher.yaml").read_text())
    for key, value in {**SHORT, **TINY}.items():
        outer, _, inner = key.partition(".")
        if inner:
            teacher[outer][inner] = value
        else:
            teacher[outer] = value
    (tmp_path / "edm-teacher.yaml").write_text(yaml.safe_dump(teacher))
    config = tmp_path / "distill.yaml"
    config.write_text((CONFIGS / "digits/edm.yaml").read_text())
    stages = yaml.safe_load(config.read_text())["method"]
    updates = {f"method.{i}.updates": 2 for i in range(len(stages))}
    outcome = cli("distill", config, *given(SHORT, updates, {"spread_every": None}))
    assert outcome.code == 0, outcome.stderr
    trained = diffkd.load(tmp_path / "runs/digits-edm-teacher/teacher")
    assert isinstance(trained.schedule, EDMSchedule) and trained.schedule.sigma_data == 0.75
    assert isinstance(trained.call, Preconditioned) and trained.null_label == 10
    for name in ("8-steps", "4-steps", "4-steps-dmd2", "2-steps", "2-steps-dmd2", "1-steps", "1-steps-dmd2"):
        folder, steps = tmp_path / "runs/digits-edm/students" / name, int(name[0])
        student = diffkd.load(folder)
        assert student.steps == steps and student.schedule.numbers(0.5) == pytest.approx(
            trained.schedule.numbers(0.5), rel=1e-9
        )
        (ours,) = diffkd.generate(student, 2, labels=[2, 1], seed=5)
        assert np.abs(ours.numpy().astype(int) - stock_images(folder, steps, [2, 1])).max() <= 1


def test_the_loss_of_training_is_the_papers(cli, tmp_path, monkeypatch):
    """Karras et al. 2022, table 1, written out: ln sigma normal, lambda = (sigma² + d²) / (sigma d)²."""
    papers = {"denoising.mean": -1.2, "denoising.std": 1.2, "schedule.sigma_max": 80}
    config = config_files.load_train(CONFIGS / "digits/edm-teacher.yaml", given(TINY, papers))
    denoiser = untrained_teacher(config, Digits(kind="digits").load())
    method = config.denoising.model_copy(update={"label_dropout": 0.0})
    x0 = torch.rand(4000, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    labels = torch.zeros(len(x0), dtype=torch.long)
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        (loss,) = method.losses(
            {"student": denoiser},
            Batch(x0, {"class_labels": labels}),
            Step(method.stages(denoiser)[0], 0),
            rng,
        )
    sigma = denoiser.schedule.at(loss.metrics["t"])[1]
    assert sigma.log().mean() == pytest.approx(-1.2, abs=0.05)
    assert sigma.log().std() == pytest.approx(1.2, abs=0.05)
    assert len(sigma.unique()) > 3990  # of no table
    weight = (sigma**2 + 0.75**2) / (sigma * 0.75) ** 2
    assert torch.allclose(loss.metrics["loss"].double(), weight * loss.metrics["gap"] ** 2, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prediction": "epsilon"}, "prediction epsilon is not what EDM's preconditioning makes"),
        ({"schedule.sigma_mx": 3}, "schedule.sigma_mx is unknown; did you mean sigma_max?"),
        ({"schedule.sigma_data": 0}, "schedule.sigma_data is 0"),
        ({"schedule.kind": "edn"}, "schedule.kind is unknown"),
    ],
)
def test_what_the_config_refuses(cli, changes, says):
    outcome = cli("train", CONFIGS / "digits/edm-teacher.yaml", "--dry-run", *given(changes))
    assert outcome.code == 2 and says in outcome.stderr, outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"name": "consistency", "steps": [2, 1]}, "2 steps drawn by renoise does not fit an EDM schedule"),
        ({"name": "output", "prediction": "flow"}, "this network is preconditioned"),
        ({"name": "scm", "steps": [1]}, "scm's angle is of a schedule that preserves variance"),
    ],
)
def test_methods_that_do_not_fit(cli, tmp_path, method, says):
    edm.save(tmp_path / "teacher", edm.network(in_channels=1, out_channels=1, num_class_embeds=10),
             diffusers.EDMEulerScheduler())  # fmt: skip
    run = {"out": str(tmp_path / "run"), "teacher": {"path": str(tmp_path / "teacher")},
           "data": {"kind": "digits"}, "method": method, "evaluation": None, "pictures": 0}  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    outcome = cli("distill", tmp_path / "run.yaml")
    assert outcome.code == 2 and says in outcome.stderr, outcome.stderr
