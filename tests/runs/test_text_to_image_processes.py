"""A text-to-image distillation in two processes, and killed in the middle: the same students."""

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests import text_to_image
from tests.runs.tiny import assert_same_runs, log, network, write

CONFIG: dict[str, Any] = {  # latents and captions cached, a weight drawn for each example, then halved
    "out": "run",
    "teacher": {"path": "teacher"},
    "data": {"kind": "folder", "path": "images", "size": 32},
    "method": [
        {"name": "guidance", "range": [1, 9], "updates": 3, "learning_rate": 1e-3, "warmup": 0},
        {"name": "progressive", "steps": [2], "updates": 3, "learning_rate": 1e-3},
    ],
    "training": {"batch_size": 4, "micro_batches": 2, "log_every": 1, "checkpoint_every": 2},
    "evaluation": None,
    "pictures": 0,
}


@pytest.fixture(params=["sd", pytest.param("xl", marks=pytest.mark.slow)])
def here(request, tmp_path, monkeypatch):
    text_to_image.teacher_and_images(tmp_path, ["a red ring", "two crosses", "a"], xl=request.param == "xl")
    monkeypatch.chdir(tmp_path)
    write("run.yaml", CONFIG)
    return tmp_path


DATA: dict[str, dict[str, Any]] = {
    "squares": CONFIG["data"],
    "buckets": {**CONFIG["data"], "path": "several", "buckets": 8, "upscale": True},
    "prompts": {"kind": "prompts", "path": "prompts.txt", "draws": 6, "steps": 2},
}


@pytest.fixture(
    params=["squares", *(pytest.param(one, marks=pytest.mark.slow) for one in ("buckets", "prompts"))]
)
def data(request, here):
    """The name of what is learned from, which the config has."""
    (here / "prompts.txt").write_text("a red ring\ntwo crosses\n")
    (here / "several").mkdir()
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate([(32, 32)] * 4 + [(24, 40)] * 3 + [(60, 30)]):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(here / "several" / f"{number}.png")
        (here / "several" / f"{number}.txt").write_text(f"caption {number % 3}")
    write("run.yaml", {**CONFIG, "data": DATA[request.param]})
    return request.param


FILES = {"squares": 3, "buckets": 2 + 3 + 1, "prompts": 2}  # of a cache, of buckets also the sizes


def cached(folder):
    place = folder / "cache"
    return {path.relative_to(place): path.read_bytes() for path in place.rglob("*.safetensors")}


def test_two_processes_distil_what_one_does(cli, here, data, launched):
    """The cache to the last bit, the students and losses up to the order of a sum."""
    assert cli("distill", "run.yaml", "out=one").code == 0
    done = launched(2, "distill", "run.yaml", "out=two")
    assert done.returncode == 0, done.stderr
    assert cached(here / "one") == cached(here / "two") and len(cached(here / "one")) == FILES[data]
    names = {folder.name for folder in (here / "one" / "students").iterdir()}
    assert len(names) == 2 and names == {folder.name for folder in (here / "two" / "students").iterdir()}
    for name in names:
        one, two = (network(here / run / "students" / name) for run in ("one", "two"))
        assert one.keys() == two.keys()
        a, b = (torch.cat([weight.double().flatten() for weight in each.values()]) for each in (one, two))
        assert (a - b).norm() / a.norm() < 1e-6
    alone, together = (log(here / run) for run in ("one", "two"))
    assert [r["loss"] for r in together] == pytest.approx([r["loss"] for r in alone], rel=2e-6)


def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(cli, here, data, launched):
    assert cli("distill", "run.yaml", "out=whole").code == 0
    strike = ("2-steps", 3, int(signal.SIGKILL))
    done = launched(1, *strike, "distill", "run.yaml", "out=broken", module="tests.runs.killed")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (here / "broken" / "students" / "2-steps").exists()
    before = cached(here / "broken")
    assert cli("distill", "run.yaml", "out=broken").code == 0
    assert_same_runs(here / "whole", here / "broken")
    assert before == cached(here / "broken") == cached(here / "whole")
