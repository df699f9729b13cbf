"""What scripts/gpu_check runs on a device."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from checking import verdicts
from checking.running import ROOT, Part

MINUTES = 8.0  # of all parts together, by default
NOT_HERE = "not on a CPU"
TOO_LONG = "left out on a CPU, where generating its code takes minutes"


def gpu_tests() -> list[str]:
    """The files that have any."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(p.relative_to(ROOT)) for p in files if "pytest.mark.gpu" in p.read_text(encoding="utf-8")]


def parts(device: str, small: bool, folder: Path, minutes: float = MINUTES) -> list[Part]:
    """folder: for what the distillation leaves. minutes: which the parts share as they do the default."""
    python, on, here = sys.executable, ("--device", device), "" if device == "cuda" else NOT_HERE
    tests = [python, "-m", "pytest", "-q", "-m", "gpu", *gpu_tests()]
    sampling = [python, "scripts/bench_sampling.py", *on, "--no-start"]
    training = [python, "scripts/bench_training.py", *on]
    distillation = [python, "scripts/checking/distillation.py", str(folder), *on]
    batches, turns = ["--batches", "1", "16", "256"], ["--rounds", "3", "--seconds", "0.3"]
    compiled = [*sampling, *turns, "--batches", "16", "1", "256", "--ways", "memory", "--modes", "compile"]
    if small:
        batches, turns = ["--batches", "1", "4"], ["--rounds", "1", "--seconds", "0.02"]
        sampling += ["--networks", "digits"]
        training += ["--networks", "digits", "--batch", "2", "--updates", "6", "--no-checkpoints"]
        distillation.append("--small")
    else:
        training += ["--batch", *batches[1:], "--updates", "15"]
    modes = ["graph", "eager"] if device == "cuda" else ["eager"]
    sampling += [*turns, *batches, "--ways", "memory", "stock", "--modes", *modes]
    of_sampling, of_training = (
        partial(told, device=device) for told in (verdicts.sampling, verdicts.training)
    )
    made = [
        Part("Tests of GPUs", tests, 100, verdicts.tests, absent=here),
        Part("Sampling", sampling, 90, of_sampling),
        Part("Training, eager", training, 70, of_training),
        Part("A distillation of 32x32 images in colour", distillation, 130, verdicts.tables),
        Part("Sampling, compiled", compiled, 90, verdicts.tables, partial=True, absent=here and TOO_LONG),
    ]
    return [replace(part, seconds=part.seconds * minutes / MINUTES) for part in made]
