"""Runs at a tiny size: their configs, what they leave behind, and signals at a chosen update."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffkd.runs import session

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {
    "out": "runs/students",
    "teacher": {"train": "teacher.yaml"},
    "data": {"kind": "digits"},
    "method": {"name": "progressive", "steps": [4, 2, 1], "updates": 3, "learning_rate": 1e-3},
    "training": {"batch_size": 16, "log_every": 1, "checkpoint_every": 1},
    "evaluation": {"samples": 32, "teacher_steps": [8]},
}
TEACHER: dict[str, Any] = {
    "out": "runs/teacher",
    "data": {"kind": "digits"},
    "model": {"channels": [8, 16], "norm_groups": 4, "mid_attention": False},
    "denoising": {"updates": 4, "warmup": 0},
    "training": {"batch_size": 16, "log_every": 1},
    "evaluation": {"samples": 32, "teacher_steps": [8]},
}
UNMEASURED = {"evaluation": None, "pictures": 0}
DEEP_TEACHER = {**TEACHER, **UNMEASURED, "model": {"channels": [8, 16], "layers": 2, "norm_groups": 4}}
# in the log, and different in every run
MEASURED = ("images_per_second", "cpu_seconds_per_update", "peak_memory_gb")
OF_LATENTS = {  # a run of a latent model, of two updates a stage
    "out": "run",
    "teacher": {"path": "teacher"},
    "data": {"kind": "folder", "path": "images", "size": 32},
    "method": {
        "name": "progressive", "steps": [4, 2], "updates": 2, "learning_rate": 1e-4, "guidance": 3.0,
    },
    "training": {"batch_size": 4, "log_every": 1, "checkpoint_every": 1},
    "evaluation": None,
    "pictures": 4,
}  # fmt: skip


def write(path: str | Path, content: dict[str, Any], **more: Any) -> Path:
    Path(path).write_text(yaml.safe_dump({**content, **more}), encoding="utf-8")
    return Path(path)


def log(folder: Path) -> list[dict[str, Any]]:
    """Without what no two runs have in common."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in r.items() if key not in MEASURED} for r in records]


def records(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "metrics.json").read_text())
    return found


def network(folder: Path) -> dict[str, torch.Tensor]:
    (weights,) = (place for name in ("unet", "transformer") if (place := folder / name).is_dir())
    return load_file(weights / "diffusion_pytorch_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def assert_same_runs(one: Path, two: Path) -> None:
    """The same students to the last bit, and the same log."""
    names = [{folder.name for folder in (run / "students").iterdir()} for run in (one, two)]
    assert names[0] == names[1]
    for name in names[0]:
        assert same(network(one / "students" / name), network(two / "students" / name)), name
    assert log(one) == log(two)


def signal_at(
    patch: pytest.MonkeyPatch, stage_name: str, update: int, *, send: Sequence[int] = (), call: Any = None
) -> None:
    """After that update of that stage, the process sends itself these signals, or calls this."""
    run_stage = session.run_stage

    def signalling(
        accelerator: Any, method: Any, stage: Any, *args: Any, on_update: Callable[..., None], **options: Any
    ) -> None:
        def update_done(done: int, record: dict[str, Any]) -> None:
            on_update(done, record)
            if (stage.name, done) == (stage_name, update):
                for number in send:
                    os.kill(os.getpid(), number)
                if call is not None:
                    call()

        run_stage(accelerator, method, stage, *args, on_update=update_done, **options)

    patch.setattr(session, "run_stage", signalling)
