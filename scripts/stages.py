"""A stage of any method, trained as `diffkd distill` trains it, from a teacher's own weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from diffkd.core.denoiser import Denoiser
from diffkd.data.images import Examples, Images
from diffkd.data.pairs import PairCache, Recipe
from diffkd.methods.base import Method, Stage
from diffkd.models import students
from diffkd.runs import distill
from diffkd.training.config import Training
from diffkd.training.run_folder import RunFolder
from diffkd.training.trainer import run_stage

PAIRS = 1024


def networks_of(method: Method, stage: Stage, teacher: Denoiser) -> dict[str, Any]:
    """The teacher, a student that begins as it, and the method's own."""
    return distill.networks_of(method, stage, teacher, students.copy_of(teacher).train())


def train(
    method: Method,
    stage: Stage,
    nets: dict[str, Any],
    images: Images,
    training: Training,
    on_update: Callable[[int, dict[str, Any]], None] = lambda update, record: None,
) -> None:
    """Into a folder that is removed. Where the stage learns from pairs, these are of noise."""
    on_cpu = nets["teacher"].device.type == "cpu"
    precision = training.precision.replace("float32", "no")
    with tempfile.TemporaryDirectory() as folder:
        examples: Examples = images if stage.pairs is None else _pairs(Path(folder) / "pairs", images)
        run = RunFolder(Path(folder) / "run", {})
        try:
            run_stage(
                Accelerator(cpu=on_cpu, mixed_precision=precision), method, stage, nets, examples, training,
                run, seed=0, stage_index=0, on_update=on_update,
            )  # fmt: skip
        finally:
            run.close()


def _pairs(folder: Path, images: Images) -> PairCache:
    classes = [1] * (images.num_classes or 0)
    recipe = Recipe("noise", "ddim", 1, 1.0, seed=0, classes=classes, shape=images.shape)
    cache = PairCache(folder, recipe, PAIRS)
    cache.begin()
    for number, pairs in enumerate(cache.shards()):
        labels = torch.arange(len(pairs)) % len(classes) if classes else None
        cache.write(number, torch.randn(len(pairs), *images.shape), labels)
    assert not cache.missing()
    return cache
