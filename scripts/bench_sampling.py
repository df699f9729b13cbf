"""How fast `diffkd sample` is, as ratios to the bare network calls that it cannot avoid:

    python scripts/bench_sampling.py [--device cuda] [--plot docs/throughput.png] [--profile digits]
    python scripts/bench_sampling.py --students runs/digits-dit/students/4-steps --batches 16
    python scripts/bench_sampling.py --modes graph eager compile --ways memory stock --no-start

(Figures: docs/performance.md.) All ways of drawing the same images take turns in one process; a ratio is the
median over rounds of its rate by the bare calls' of that round: those of the network, and of an
autoencoder, that a draw makes, repeated on the same inputs. On CUDA these are captured in one graph.

- memory: noise to uint8 in memory; npz, png: the same and written, as the command writes them;
- stock: the diffusers pipeline by its own code, to float arrays; `over stock` is memory's rate by its;
- start (last lines): `diffkd --help`, and a first image of the digits student, as whole processes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

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
from diffkd.models import loading, saving
from diffkd.runs.reports import model_card

STEPS = 4
BATCHES = {
    "cpu": {"digits": (1, 16, 64), "middle": (1, 4, 16), "cifar10": (1, 4)},
    "cuda": dict.fromkeys(NETWORKS, (1, 16, 256)),
}
SECONDS = 0.8  # of a turn
WAYS = ("memory", "npz", "png", "stock")  # beside the network alone
PROMPT = "a small red ring above a large blue square"
Recorded = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Turns:
    """What is measured of each network and batch size. modes: of the generator; ways: some of WAYS; seconds:
    of each of their turns, in so many rounds."""

    modes: Sequence[str]
    ways: Sequence[str]
    rounds: int
    seconds: float


class Ways:
    """The ways to draw `count` images of one network at one batch size. call: further arguments of the stock
    pipeline's. mode: of the generator."""

    def __init__(
        self, denoiser: Denoiser, batch: int, folder: Path, stock: Any, call: Mapping[str, Any], mode: str
    ) -> None:
        self.denoiser, self.batch, self.folder, self.stock = denoiser, batch, folder, stock
        self.device, self.mode = denoiser.device, mode
        self.prompts = None if denoiser.conditioner is None else [PROMPT]
        self.call = {**call, **({"prompt": [PROMPT] * batch} if self.prompts else {})}
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
        """The calls that one batch cannot do without, on the inputs of a first one."""
        calls = recorded(self.denoiser, self._generator(self.batch, "eager"))

        def repeat() -> tuple[torch.Tensor, ...]:
            for function, args, kwargs in calls:
                out = function(*args, **kwargs)
            return (out if isinstance(out, torch.Tensor) else out[0],)

        with torch.inference_mode():
            runner = cuda_graphs.Graph(repeat, ()) if self.device.type == "cuda" else repeat

        @torch.inference_mode()
        def run() -> object:
            return runner()

        return run

    def _generator(self, count: int, mode: str) -> ImageGenerator:
        return ImageGenerator(self.denoiser, count, prompts=self.prompts, batch_size=self.batch, mode=mode)

    def generator(self) -> ImageGenerator:
        if self.count not in self.prepared:
            self.prepared = {self.count: self._generator(self.count, self.mode)}
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
        for _ in generate_stock(
            self.stock,
            self.count,
            steps=self.denoiser.steps,
            labels=labels,
            batch_size=self.batch,
            call=self.call,
        ):
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


def recorded(denoiser: Denoiser, generator: ImageGenerator) -> list[Recorded]:
    """The calls of its network and of its autoencoder, in turn, as the generator draws its images."""
    calls: list[Recorded] = []

    def kept(function: Callable[..., Any]) -> Callable[..., Any]:
        def recording(*args: Any, **kwargs: Any) -> Any:
            calls.append((function, args, kwargs))
            return function(*args, **kwargs)

        return recording

    with ExitStack() as patched:
        of_network = patch.object(denoiser.network, "forward", kept(denoiser.network.forward))
        patched.enter_context(of_network)
        if denoiser.codec is not None:
            autoencoder = denoiser.codec.network
            patched.enter_context(patch.object(autoencoder, "decode", kept(autoencoder.decode)))
        for _ in generator.batches():
            pass
    return calls


def save(denoiser: Denoiser, folder: Path) -> Path:
    saving.save(denoiser, folder)
    model_card.write(folder, model_card.describe(denoiser))
    return folder


def open_stock(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A student as diffusers opens it; in float16 for bfloat16, which pixel pipelines cannot do."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    without = {name: None for name, entry in index.items() if entry == [None, None]}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **without).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch.float16 if dtype == torch.bfloat16 else dtype)


def measure(
    name: str, denoiser: Denoiser, folder: Path, dtype: torch.dtype, turns: Turns, sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """folder: where it is saved."""
    rows = []
    stock, call = open_stock(folder, denoiser.device, dtype), loading.card(folder).get("call", {})
    denoiser.to(dtype)
    names = ("network", *turns.ways)
    with tempfile.TemporaryDirectory() as place:
        for batch, mode in itertools.product(sizes, turns.modes):
            ways = Ways(denoiser, batch, Path(place), stock, call, mode).sized(turns.seconds)
            for way in names:
                ways.turn(way)  # once before it counts
            rates: dict[str, list[float]] = {way: [] for way in names}
            for number in range(turns.rounds):
                first = number % len(names)
                for way in names[first:] + names[:first]:
                    rates[way].append(ways.turn(way))
            over = {
                way: statistics.median(a / b for a, b in zip(rates[way], rates["network"], strict=True))
                for way in names
            }
            if {"memory", "stock"} <= rates.keys():
                over["over stock"] = statistics.median(
                    a / b for a, b in zip(rates["memory"], rates["stock"], strict=True)
                )
            row = {
                "network": name, "batch": batch, "path": ways.generator().prepare().path,
                "rates": {way: statistics.median(found) for way, found in rates.items()}, "over": over,
            }  # fmt: skip
            rows.append(row)
            shown = [f"{row['rates'][way]:,.1f}" if way in rates else "" for way in ("network", "memory")]
            shown += [f"{over[way]:.3f}" if way in over else "" for way in (*WAYS, "over stock")]
            cells = (f"{name} ({parameters(denoiser)})", batch, row["path"], *shown)
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
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
        student = save(denoiser, Path(place) / "student")
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
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each turn")
    parser.add_argument("--modes", nargs="+", default=["auto"], choices=cuda_graphs.MODES)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="beside the network")
    parser.add_argument("--no-start", action="store_true", help="without whole processes")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument(
        "--students", nargs="+", type=Path, help="folders of students, in place of the networks"
    )
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--profile", choices=list(NETWORKS))
    given = parser.parse_args()
    if given.plot and (len(given.modes) > 1 or not {"memory", "png", "stock"} <= {*given.ways}):
        parser.error("--plot draws memory, png and stock in one of --modes")
    turns = Turns(given.modes, given.ways, given.rounds, given.seconds)
    device = torch.device(given.device)
    dtype = getattr(torch, given.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    print(f"{describe(device)}; {dtype}" + ("" if given.students else f", {STEPS} steps"))
    sizes = BATCHES[device.type]
    if given.profile:
        profile(given.profile, device, dtype, max(given.batches or sizes[given.profile]))
        return
    print(
        "| network | batch | path | network alone, images/s | in memory | ratio | npz | png | stock "
        "| over stock |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    if given.students:
        for folder in given.students:
            student = loading.load(folder, device=device).eval()
            name = f"{folder.parent.parent.name}, {folder.name}"
            measure(name, student, folder, dtype, turns, given.batches or BATCHES["cuda"]["digits"])
        return
    rows = []
    for name in given.networks:
        denoiser = make(name, device)
        denoiser.steps = STEPS
        with tempfile.TemporaryDirectory() as place:
            folder = save(denoiser, Path(place) / "model")
            rows += measure(name, denoiser, folder, dtype, turns, given.batches or sizes[name])
    if not given.no_start:
        start(given.rounds)
    if given.plot:
        plot(rows, given.plot, describe(device))


if __name__ == "__main__":
    main()
