"""`diffkd distill` into students of fewer blocks than their transformer teachers, which open in stock."""

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

import diffkd
from diffkd.core.denoiser import Denoiser
from diffkd.models import sizes
from tests import dit, flow_pipelines, masked_pipelines
from tests.runs.tiny import OF_LATENTS, assert_same_runs, network, signal_at
from tests.transformers import DEEP, KINDS, LISTS

CAPTIONS = ["a red ring", "a star above a square", "two crosses", "a small circle", "a ring"]
BY_DEFAULT = ("dit", "sd3", "flux")  # the others are slow
SMALLER: dict[str, Any] = {
    "student": {"kind": "drop_blocks", "keep": 0.5},
    "method": [
        {"name": "feature", "updates": 1, "warmup": 0, "learning_rate": 1e-3},
        {"name": "progressive", "steps": [2], "updates": 2, "learning_rate": 1e-3},
    ],
    "pictures": 0,
}


def make(kind: str, folder: Path) -> None:
    """A teacher and images for it."""
    if kind == "dit":
        dit.teacher_and_images(folder, **DEEP[kind])
    elif kind in ("sd3", "flux"):
        flow_pipelines.teacher_and_images(folder, kind, CAPTIONS, **DEEP[kind])
    else:
        masked_pipelines.teacher_and_images(folder, kind, CAPTIONS, **DEEP[kind])


def stock_images(folder: Path, asked: dict[str, Any]) -> np.ndarray:
    """uint8 images of the stock pipeline, called as the student's card says."""
    card = json.loads((folder / "diffkd.json").read_text())
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        **asked, generator=[torch.Generator().manual_seed(5 + i) for i in range(2)],
        num_inference_steps=card["steps"], output_type="np", **card["call"],
    ).images  # fmt: skip
    return np.rint(images * 255)


def prepare(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
    make(kind, folder)
    monkeypatch.chdir(folder)
    data = {**OF_LATENTS["data"], "size": masked_pipelines.PIXELS.get(kind, 32)}
    Path("run.yaml").write_text(yaml.safe_dump({**OF_LATENTS, **SMALLER, "data": data, **more}))


def check_drawn(kind: str, folder: Path) -> Denoiser:
    """Stock draws the student to the last bit of a pixel, and its card says its size."""
    student = diffkd.load(folder)
    asked: dict[str, Any] = {"class_labels": [0, 1]} if kind == "dit" else {"prompt": CAPTIONS[:2]}
    given: dict[str, Any] = {"labels": [0, 1]} if kind == "dit" else {"prompts": CAPTIONS[:2]}
    (ours,) = diffkd.generate(student, 2, seed=5, **given)
    assert np.abs(ours.numpy().astype(int) - stock_images(folder, asked)).max() <= 1
    size, whole = sizes.denoiser_size(student), sizes.denoiser_size(diffkd.load("teacher"))
    card = json.loads((folder / "diffkd.json").read_text())
    assert (card["parameters"], card["macs"]) == size[:2] and size.macs < whole.macs
    return student


@pytest.mark.parametrize(
    "kind", [kind if kind in BY_DEFAULT else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_fewer_blocks_then_fewer_steps(cli, tmp_path, monkeypatch, kind):
    """Stopped amid the second stage and resumed, it ends with the bits of a run that was not."""
    prepare(kind, tmp_path, monkeypatch)
    with monkeypatch.context() as patch:
        signal_at(patch, "2-steps", 1, send=[signal.SIGTERM])
        assert cli("distill", "run.yaml").code == 130
    outcome = cli("distill", "run.yaml")
    assert outcome.code == 0, outcome.stderr
    student = check_drawn(kind, Path("run/students/2-steps"))
    for name, count in LISTS[kind].items():
        assert len(getattr(student.network, name)) == int(count * 0.5 + 0.5)
    first, last = (network(Path("run/students") / name) for name in ("feature", "2-steps"))
    assert first.keys() == last.keys() and any((first[key] != last[key]).any() for key in first)
    assert cli("distill", "run.yaml", "out=whole").code == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in ("sana", "lumina2") if kind in KINDS])
def test_fewer_hidden_channels(cli, tmp_path, monkeypatch, kind):
    """Those that the gradients on the data choose."""
    student = {"kind": "narrow", "ratio": 0.5, "importance": "taylor"}
    prepare(kind, tmp_path, monkeypatch, student=student, method=SMALLER["method"][1])
    outcome = cli("distill", "run.yaml")
    assert outcome.code == 0, outcome.stderr
    check_drawn(kind, Path("run/students/2-steps"))


def test_a_resolved_config_says_what_stays(cli, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**OF_LATENTS, **SMALLER}))
    outcome = cli("distill", tmp_path / "run.yaml", "student.keep=0.25", "--dry-run")
    assert outcome.code == 0, outcome.stderr
    assert yaml.safe_load(outcome.stdout)["student"]["keep"] == 0.25
