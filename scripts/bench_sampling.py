"""How fast `diffkd sample` is, as ratios to the bare network calls that it cannot avoid:

    python scripts/bench_sampling.py [--device cuda] [--plot docs/throughput.png] [--profile digits]

(Figures: docs/performance.md.) All ways of drawing the same images take turns in one process; a ratio is the
median over rounds of its rate by the bare calls' of that round. On CUDA these are captured in one graph.

- memory: noise to uint8 in memory; npz, png: the same and written, as the command writes them;
- stock: the diffusers pipeline by its own code, to float arrays; `over stock` is memory's rate by its;
- start (last lines): `diffkd --help`, and a first image of the digits student, as whole processes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from machine import describe, synchronize
from networks import NETWORKS, make, parameters

from diffkd.core.denoiser import Denoiser
from diffkd.generation import cuda_graphs
from diffkd.generation.folder_writer import FolderWriter
from diffkd.generation.generator import ImageGenerator
from diffkd.generation.npz_writer import NpzWriter
from diffkd.generation.sample import default_workers
from diffkd.generation.stock import generate_stock
from diffkd.generation.writer import ImageWriter
from diffkd.models import loading
from diffkd.runs.reports import model_card

STEPS = 4
BATCHES = {
    "cpu": {"digits": (1, 16, 64), "middle": (1, 4, 16), "cifar10": (1, 4)},
    "cuda": dict.fromkeys(NETWORKS, (1, 16, 256)),
}
SECONDS = 0.8  # of a turn


class Ways:
    """The ways to draw `count` images of one network at one batch size."""

    def __init__(self, denoiser: Denoiser, batch: int, folder: Path, stock: Any) -> None:
        self.denoiser, self.batch, self.folder, self.stock = denoiser, batch, folder, stock
        self.device = denoiser.device
        self.count = batch
        self.bare = self._bare()
        self.prepared: dict[int, ImageGenerator] = {}

    def sized(self, seconds: float) -> Ways:
        """With as many images as take about so long."""
        self.bare()
        synchronize(self.device)
        started = time.perf_counter()
        self.bare()
        synchronize(self.device)
        self.count = self.batch * max(1, round(seconds / (time.perf_counter() - started)))
        return self

    def _bare(self) -> Callable[[], object]:
        """The network calls of one batch, on inputs that are there."""
        network: Any = self.denoiser.network
        assert self.denoiser.shape is not None
        with torch.inference_mode():
            x = torch.randn(self.batch, *self.denoiser.shape, device=self.device).to(self.denoiser.dtype)
            t = torch.full((self.batch,), 500.0, device=self.device)
            labels = torch.zeros(self.batch, dtype=torch.long, device=self.device)
            cond = {"class_labels": labels} if self.denoiser.num_classes else {}
            if self.device.type == "cuda":
                network.to(memory_format=torch.channels_last)
                x = x.contiguous(memory_format=torch.channels_last)

            def calls() -> tuple[torch.Tensor, ...]:
                for _ in range(STEPS):
                    out = network(x, t, **cond).sample
                return (out,)

            runner = cuda_graphs.Graph(calls, ()) if self.device.type == "cuda" else calls

        @torch.inference_mode()
        def run() -> object:
            return runner()

        return run

    def generator(self) -> ImageGenerator:
        if self.count not in self.prepared:
            self.prepared = {
                self.count: ImageGenerator(self.denoiser, self.count, steps=STEPS, batch_size=self.batch)
            }
            self.prepared[self.count].prepare()
        return self.prepared[self.count]

    def network(self) -> None:
        for _ in range(self.count // self.batch):
            self.bare()

    def memory(self) -> None:
        for _ in self.generator().batches():
            pass

    def written(self, output: ImageWriter) -> None:
        generator = self.generator()
        for batch, images in enumerate(generator.arrays()):
            output.write(np.arange(*generator.image_range(batch)), images)
        output.flush()

    def stock_pipeline(self) -> None:
        labels = torch.zeros(self.count, dtype=torch.long) if self.denoiser.num_classes else None
        for _ in generate_stock(self.stock, self.count, steps=STEPS, labels=labels, batch_size=self.batch):
            pass

    def turn(self, way: str) -> float:
        """Images a second, from the first noise to the last byte. Workers are there before."""
        output: ImageWriter | None = None
        if way in ("npz", "png"):
            out = self.folder / f"{way}-{time.time_ns()}"
            output = (
                NpzWriter(out.with_suffix(".npz"))
                if way == "npz"
                else (FolderWriter(out, "png", default_workers()))
            )
            output.start({}, self.count, False, output.plan({}, self.count, False))
            output.warm()
        synchronize(self.device)
        started = time.perf_counter()
        if output is not None:
            self.written(output)
            if way == "npz":
                output.finish({}, self.count, None)
        else:
            {"network": self.network, "memory": self.memory, "stock": self.stock_pipeline}[way]()
        synchronize(self.device)
        took = time.perf_counter() - started
        if output is not None:
            output.close()
        return self.count / took


def open_stock(denoiser: Denoiser, folder: Path) -> Any:
    """The same student as diffusers opens it; in float16 for bfloat16, which pixel pipelines cannot do."""
    loading.save(denoiser, folder)
    model_card.write(folder, model_card.describe(denoiser))
    pipeline = loading.open_stock(folder).to(denoiser.device)
    return pipeline.to(torch.float16) if denoiser.dtype == torch.bfloat16 else pipeline


def measure(
    name: str, device: torch.device, dtype: torch.dtype, rounds: int, sizes: tuple[int, ...]
) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as place:
        denoiser = make(name, device)
        denoiser.steps = STEPS
        stock = open_stock(denoiser, Path(place) / "model")
        denoiser.to(dtype)
        for batch in sizes:
            ways = Ways(denoiser, batch, Path(place), stock).sized(SECONDS)
            names = ("network", "memory", "npz", "png", "stock")
            for way in names:
                ways.turn(way)  # once before it counts
            rates: dict[str, list[float]] = {way: [] for way in names}
            for number in range(rounds):
                for way in names[number % 5 :] + names[: number % 5]:
                    rates[way].append(ways.turn(way))
            over = {
                way: statistics.median(a / b for a, b in zip(rates[way], rates["network"], strict=True))
                for way in names
            }
            over["over stock"] = statistics.median(
                a / b for a, b in zip(rates["memory"], rates["stock"], strict=True)
            )
            row = {
                "network": name, "batch": batch, "path": ways.generator().prepare().path,
                "rates": {way: statistics.median(found) for way, found in rates.items()}, "over": over,
            }  # fmt: skip
            rows.append(row)
            print(
                f"| {name} ({parameters(denoiser)}) | {batch} | {row['path']} "
                f"| {row['rates']['network']:,.1f} | {row['rates']['memory']:,.1f} "
                + "".join(f"| {over[way]:.3f} " for way in ("memory", "npz", "png", "stock", "over stock"))
                + "|",
                flush=True,
            )
    return rows


def seconds_of(*command: str) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def start(rounds: int) -> None:
    """Whole processes, in turn: the command's help, and its first image against what it cannot do without."""
    here = [sys.executable, "-m", "diffkd.cli"]
    with tempfile.TemporaryDirectory() as place:
        denoiser = make("digits", torch.device("cpu"))
        denoiser.steps = STEPS
        student = Path(place) / "student"
        open_stock(denoiser, student)
        least = (
            "import torch, diffusers\n"
            f"diffusers.UNet2DModel.from_pretrained({str(student / 'unet')!r}, use_safetensors=True)"
        )
        times = []
        for number in range(rounds + 1):
            out = Path(place) / f"{number}"
            drawn = [*here, "sample", str(student), "-n", "1", "--out", str(out), "--device", "cpu"]
            one = seconds_of(*here, "--help"), seconds_of(sys.executable, "-c", least), seconds_of(*drawn)
            times.append(one)
        times = times[1:]  # without the first, which fills the caches of the disk
    shown, loaded, first = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(c / b for _, b, c in times)
    print(f"\ndiffkd --help: {shown:.2f} s")
    print(
        f"first image of the digits student: {first:.2f} s, {ratio:.2f} times `import torch, diffusers` and "
        f"loading it ({loaded:.2f} s)"
    )


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Throughput against batch size, with the limit drawn in."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(NETWORKS), figsize=(12, 3.8), layout="constrained")
    lines = {"network": ("network alone: the limit", "--"), "memory": ("diffkd, in memory", "-"),
             "png": ("diffkd, to PNG", "-"), "stock": ("stock pipeline", "-")}  # fmt: skip
    for name, axis in zip(NETWORKS, axes, strict=True):
        mine = [row for row in rows if row["network"] == name]
        for way, (label, style) in lines.items():
            points = [row["rates"]["network"] * row["over"][way] for row in mine]  # the machine's pace aside
            axis.plot([row["batch"] for row in mine], points, style, marker="o", label=label)
        axis.set(title=name, xlabel="batch size", xscale="log", ylim=(0, None))
        axis.set_xticks([row["batch"] for row in mine], [str(row["batch"]) for row in mine], minor=False)
        axis.minorticks_off()
        axis.grid(linewidth=0.4)
    axes[0].set_ylabel(f"images/s, {STEPS} steps")
    axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)


def profile(name: str, device: torch.device, dtype: torch.dtype, batch: int) -> None:
    denoiser = make(name, device).to(dtype)
    generator = ImageGenerator(denoiser, 8 * batch, steps=STEPS, batch_size=batch)
    for _ in generator.batches():
        pass
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as seen:
        for _ in generator.batches():
            pass
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(seen.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60))
    spent = generator.timer.seconds()
    print({key: f"{value / sum(spent.values()):.1%}" for key, value in spent.items()})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--profile", choices=list(NETWORKS))
    given = parser.parse_args()
    device = torch.device(given.device)
    dtype = getattr(torch, given.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    print(f"{describe(device)}; {dtype}, {STEPS} steps")
    sizes = BATCHES[device.type]
    if given.profile:
        profile(given.profile, device, dtype, max(given.batches or sizes[given.profile]))
        return
    print(
        "| network | batch | path | network alone, images/s | in memory | ratio | npz | png | stock "
        "| over stock |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for name in given.networks:
        rows += measure(name, device, dtype, given.rounds, tuple(given.batches or sizes[name]))
    start(given.rounds)
    if given.plot:
        plot(rows, given.plot, describe(device))


if __name__ == "__main__":
    main()
