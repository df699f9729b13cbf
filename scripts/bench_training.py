"""What one training update costs over the network passes that it cannot avoid (docs/performance.md):

    python scripts/bench_training.py [--device cuda] [--precision bf16] [--profile digits]
    python scripts/bench_training.py --method dmd2 sid --networks digits      # or --method all

The minimum is written out by hand (scripts/minimums.py): the same passes, fused AdamW for every network that
learns, the student's average, nothing else. It runs between the updates of a real stage, so other work on the
machine hits both alike, and on a CPU the clock is the process's own time; the ratio is the median over the
updates. Then, without --method or --no-checkpoints, what a checkpoint costs a stage that saves one every few
updates. --profile: where the time of an update goes.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import stages
import torch
from machine import describe, seconds, synchronize
from minimums import SETTINGS, Bare
from networks import NETWORKS, make, parameters
from stages import networks_of

from diffkd import methods
from diffkd.core.denoiser import Denoiser
from diffkd.data.images import Images
from diffkd.methods.base import Method
from diffkd.training import trainer
from diffkd.training.config import Training

BATCH = {"cpu": {"digits": 128, "middle": 16, "cifar10": 8}, "cuda": dict.fromkeys(NETWORKS, 128)}


def start(name: str, device: torch.device, method: str) -> Denoiser:
    """What the stage begins from: the network of that name, for a second stage as a first one leaves it."""
    teacher = make(name, device)
    if method == "tcm":
        teacher.steps, teacher.sampler = 4, "renoise"
    return teacher


def train(
    name: str, device: torch.device, method_name: str, training: Training, updates: int,
    on_update: Callable[[int, dict[str, Any]], None],
    on_networks: Callable[[Method, dict[str, Any]], None] = lambda method, nets: None,
) -> None:  # fmt: skip
    """One stage on random images. on_networks: is given the networks before they are trained."""
    teacher = start(name, device, method_name)
    method = methods.find(method_name)(**SETTINGS[method_name], updates=updates)
    stage = method.stages(teacher)[0]
    nets = networks_of(method, stage, teacher)
    on_networks(method, nets)
    shape = teacher.shape
    assert shape is not None
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1024, *shape), dtype=np.uint8)
    labels = torch.arange(1024) % 10 if teacher.num_classes else None
    images = Images("random", pixels, labels, [str(i) for i in range(10)] if teacher.num_classes else [])
    stages.train(method, stage, nets, images, training, on_update)


def measure(
    name: str, device: torch.device, precision: str, updates: int, batch: int, method: str = "progressive"
) -> None:
    minimum: Bare | None = None
    ours: list[float] = []
    theirs: list[float] = []
    clock = seconds(device)
    record: dict[str, Any] = {}

    def on_networks(settings: Method, nets: dict[str, Any]) -> None:
        nonlocal minimum, clock
        minimum = Bare(settings, nets, batch, precision)
        clock = seconds(device)

    def on_update(done: int, logged: dict[str, Any]) -> None:
        nonlocal clock, record
        assert minimum is not None
        now = seconds(device)
        ours.append(now - clock)
        minimum.update()
        clock = seconds(device)
        theirs.append(clock - now)
        record = logged

    training = Training(batch_size=batch, precision=precision)
    train(name, device, method, training, updates, on_update, on_networks)
    kept = slice(3, None)  # without the first, which allocate
    ratio = statistics.median(a / b for a, b in zip(ours[kept], theirs[kept], strict=True))
    memory = record.get("peak_memory_gb")
    print(
        f"| {method} | {name} ({parameters(make(name, device))}) | {batch} | {precision} "
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
        train(name, device, "progressive", training, 8 * every, on_update)
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


def profile(name: str, device: torch.device, precision: str, batch: int, method: str) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as seen:
        measure(name, device, precision, 8, batch, method)
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
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--no-checkpoints", action="store_true", help="without what they cost")
    parser.add_argument(
        "--method", nargs="+", default=[], choices=["all", *SETTINGS], help="default progressive"
    )
    parser.add_argument("--profile", choices=list(NETWORKS))
    given = parser.parse_args()
    device = torch.device(given.device)
    precision = given.precision or ("bf16" if device.type == "cuda" else "float32")
    diffusers.utils.logging.set_verbosity_error()
    logging.getLogger("torch").setLevel(logging.ERROR)
    print(describe(device))
    sizes = {name: given.batch or [size] for name, size in BATCH[device.type].items()}
    chosen = list(SETTINGS) if "all" in given.method else given.method or ["progressive"]
    if given.profile:
        for method in chosen:
            profile(given.profile, device, precision, max(sizes[given.profile]), method)
        return
    print("| method | network | batch | precision | our update | the minimum | ratio | peak memory, GB |")
    print("|---|---|---|---|---|---|---|---|")
    for method in chosen:
        for name in given.networks:
            for batch in sizes[name]:
                measure(name, device, precision, given.updates, batch, method)
    if given.method or given.no_checkpoints:
        return
    print("\n| network | batch | checkpoint | an update | the copy | all that it costs | in updates |")
    print("|---|---|---|---|---|---|---|")
    for name in given.networks:
        pause(name, device, precision, max(sizes[name]))


if __name__ == "__main__":
    main()
