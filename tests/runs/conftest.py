"""Tiny models and runs that are trained once for all tests; read them, or copy them before writing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import Tensor

from diffkd.core import samplers
from diffkd.core.denoiser import Denoiser
from diffkd.runs import config_files
from diffkd.runs.config import Distill, Train
from diffkd.runs.distill import distill
from diffkd.runs.train import train
from tests.runs import tiny

BuiltOnce = Callable[[str, Callable[[Path], object]], Path]
QUIET = Console(quiet=True)
STOPPED = {  # the run that is stopped and resumed in many ways
    **tiny.CONFIG, **tiny.UNMEASURED,
    "method": {"name": "progressive", "steps": [4, 1], "updates": 8, "learning_rate": 1e-3},
    "training": {"batch_size": 16, "log_every": 1, "checkpoint_every": 5},
}  # fmt: skip


def _train(content: dict[str, Any]) -> Callable[[Path], object]:
    def build(folder: Path) -> None:
        path = tiny.write(folder / "teacher.yaml", content, out=str(folder / "run"))
        train(config_files.load(path, Train), QUIET)

    return build


@pytest.fixture(scope="session")
def tiny_teacher(built_once: BuiltOnce) -> Path:
    """The pipeline of tiny.TEACHER."""
    content = {**tiny.TEACHER, **tiny.UNMEASURED}
    return built_once("tiny-teacher", _train(content)) / "run/teacher"


@pytest.fixture(scope="session")
def deep_teacher(built_once: BuiltOnce) -> Path:
    """The pipeline of tiny.DEEP_TEACHER, with blocks to drop and attention in the middle."""
    return built_once("deep-teacher", _train(tiny.DEEP_TEACHER)) / "run/teacher"


@pytest.fixture(scope="session")
def unstopped(built_once: BuiltOnce, tiny_teacher: Path) -> Path:
    """The run folder of STOPPED where nothing stopped it."""

    def build(folder: Path) -> None:
        teacher = {"path": str(tiny_teacher)}
        path = tiny.write(folder / "distill.yaml", STOPPED, teacher=teacher, out=str(folder / "run"))
        distill(config_files.load(path, Distill), QUIET)

    return built_once("unstopped", build) / "run"


@pytest.fixture
def drawn_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sampling steps of each image that is drawn from now on."""
    counts: list[int] = []
    real = samplers.sample

    def counted(denoiser: Denoiser, noise: Tensor, steps: int, *args: Any, **options: Any) -> Tensor:
        counts.extend([steps] * len(noise))
        return real(denoiser, noise, steps, *args, **options)

    monkeypatch.setattr(samplers, "sample", counted)
    return counts
