"""What one training update costs over the five network passes that it cannot avoid (docs/performance.md):

    python scripts/bench_training.py [--device cuda] [--precision bf16] [--profile digits]

The minimum is written out by hand below: student forward and backward, two teacher forwards, fused AdamW,
foreach EMA, nothing else. It runs between the updates of a real stage, so other work on the machine hits both
alike; the ratio is the median over updates. Then what a checkpoint costs a stage that saves one every few
updates. --profile: where the time of an update goes.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from machine import describe, synchronize
from networks import NETWORKS, make, parameters

from diffkd.core.denoiser import Denoiser
from diffkd.data.images import Images
from diffkd.methods.progressive import Progressive
from diffkd.training import trainer
from diffkd.training.config import Training
from diffkd.training.run_folder import RunFolder
from diffkd.training.trainer import run_stage

BATCH = {"cpu": {"digits": 128, "middle": 16, "cifar10": 8}, "cuda": dict.fromkeys(NETWORKS, 128)}


class Minimum:
    """The bare loop: the same passes over inputs that are there."""

    def __init__(self, denoiser: Denoiser, batch: int, precision: str) -> None:
        self.device, self.precision = denoiser.device, precision
        self.teacher = copy.deepcopy(denoiser.network).requires_grad_(False)
        if precision == "bf16":
            self.teacher.to(torch.bfloat16)
        self.student: Any = copy.deepcopy(denoiser.network).train()
        self.params = list(self.student.parameters())
        self.shadow = [p.detach().clone() for p in self.params]
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-5, fused=True)
        assert denoiser.shape is not None
        self.x = torch.randn(batch, *denoiser.shape, device=self.device)
        self.t = torch.full((batch,), 500.0, device=self.device)
        labels = torch.zeros(batch, dtype=torch.long, device=self.device)
        self.cond = {"class_labels": labels} if denoiser.num_classes else {}

    def __call__(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            with torch.inference_mode():
                self.teacher(self.x.to(self.teacher.dtype), self.t, **self.cond)
                aim = self.teacher(self.x.to(self.teacher.dtype), self.t, **self.cond).sample
            loss = (self.student(self.x, self.t, **self.cond).sample - aim).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch._foreach_lerp_(self.shadow, self.params, 0.01)


def train(
    teacher: Denoiser,
    training: Training,
    updates: int,
    on_update: Callable[[int, dict[str, Any]], None],
) -> None:
    """One stage on random images."""
    student = copy.deepcopy(teacher).train()
    student.steps = 4
    shape = teacher.shape
    assert shape is not None
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1024, *shape), dtype=np.uint8)
    labels = torch.arange(1024) % 10 if teacher.num_classes else None
    images = Images("random", pixels, labels, [str(i) for i in range(10)] if teacher.num_classes else [])
    method = Progressive(steps=[4], updates=updates)
    accelerator = Accelerator(
        cpu=teacher.device.type == "cpu", mixed_precision=training.precision.replace("float32", "no")
    )
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder) / "run", {})
        run_stage(
            accelerator, method, method.stages(teacher)[0],
            {"student": student, "teacher": teacher.requires_grad_(False)}, images, training, run,
            seed=0, stage_index=0, on_update=on_update,
        )  # fmt: skip
        run.close()


def measure(name: str, device: torch.device, precision: str, updates: int, batch: int) -> None:
    teacher = make(name, device)
    minimum = Minimum(teacher, batch, precision)
    ours: list[float] = []
    theirs: list[float] = []
    clock = time.perf_counter()
    record: dict[str, Any] = {}

    def on_update(done: int, logged: dict[str, Any]) -> None:
        nonlocal clock, record
        synchronize(device)
        now = time.perf_counter()
        ours.append(now - clock)
        minimum()
        synchronize(device)
        clock = time.perf_counter()
        theirs.append(clock - now)
        record = logged

    train(teacher, Training(batch_size=batch, precision=precision), updates, on_update)
    kept = slice(3, None)  # without the first, which allocate
    ratio = statistics.median(a / b for a, b in zip(ours[kept], theirs[kept], strict=True))
    memory = record.get("peak_memory_gb")
    print(
        f"| {name} ({parameters(teacher)}) | {batch} | {precision} "
        f"| {1e3 * statistics.median(ours[kept]):.1f} ms | {1e3 * statistics.median(theirs[kept]):.1f} ms "
        f"| {ratio:.3f} | {memory} |",
        flush=True,
    )


def pause(name: str, device: torch.device, precision: str, batch: int, every: int = 6) -> None:
    """How much longer an update takes that a checkpoint is saved before and written beside."""
    intervals: list[float] = []
    saves: list[float] = []
    clock = time.perf_counter()
    save = trainer.save

    def timed(*args: Any) -> None:
        started = time.perf_counter()
        save(*args)
        saves.append(time.perf_counter() - started)

    def on_update(done: int, logged: dict[str, Any]) -> None:
        nonlocal clock
        synchronize(device)
        intervals.append(time.perf_counter() - clock)
        clock = time.perf_counter()

    trainer.save = timed
    try:
        training = Training(batch_size=batch, precision=precision, checkpoint_every=every)
        train(make(name, device), training, 8 * every, on_update)
    finally:
        trainer.save = save
    size = sum(4 * p.numel() * p.element_size() for p in make(name, device).parameters())
    usual = statistics.median(t for n, t in enumerate(intervals) if n > 3 and n % every not in (0, 1))
    longer = statistics.median(
        sum(intervals[n : n + every]) - every * usual for n in range(every, 8 * every, every)
    )
    print(
        f"| {name} | {batch} | {size / 1e6:.0f} MB | {1e3 * usual:.1f} ms "
        f"| {1e3 * statistics.median(saves):.1f} ms "
        f"| {1e3 * longer:.1f} ms | {longer / usual:.2f} |",
        flush=True,
    )


def profile(name: str, device: torch.device, precision: str, batch: int) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as seen:
        measure(name, device, precision, 8, batch)
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(seen.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("float32", "bf16"))
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--batch", type=int)
    parser.add_argument("--profile", choices=list(NETWORKS))
    given = parser.parse_args()
    device = torch.device(given.device)
    precision = given.precision or ("bf16" if device.type == "cuda" else "float32")
    diffusers.utils.logging.set_verbosity_error()
    logging.getLogger("torch").setLevel(logging.ERROR)
    print(describe(device))
    sizes = BATCH[device.type]
    if given.profile:
        profile(given.profile, device, precision, given.batch or sizes[given.profile])
        return
    print("| network | batch | precision | our update | the minimum | ratio | peak memory, GB |")
    print("|---|---|---|---|---|---|---|")
    for name in given.networks:
        measure(name, device, precision, given.updates, given.batch or sizes[name])
    print("\n| network | batch | checkpoint | an update | the copy | all that it costs | in updates |")
    print("|---|---|---|---|---|---|---|")
    for name in given.networks:
        pause(name, device, precision, given.batch or sizes[name])


if __name__ == "__main__":
    main()
