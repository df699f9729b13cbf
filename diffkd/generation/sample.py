"""`diffkd sample`: images of a model to a folder of image files or one .npz, with a grid."""

from __future__ import annotations

import os
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from diffkd.core.denoiser import Denoiser
from diffkd.core.digest import digest
from diffkd.errors import Unfinished, UserError, printable
from diffkd.generation import cuda_graphs, grids
from diffkd.generation.drawing import Drawing, proportional
from diffkd.generation.encoding import FORMATS
from diffkd.generation.folder_writer import FolderWriter
from diffkd.generation.npz_writer import NpzWriter
from diffkd.generation.timing import Clock
from diffkd.generation.writer import ImageWriter, ResumePlan
from diffkd.io.processes import Processes, usable_device
from diffkd.io.progress import bar
from diffkd.io.text import log, reason
from diffkd.models import loading

MOST_CLASSES = 1_000_000
MOST_WORKERS = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_classes(text: str) -> list[int] | str:
    """Labels in turn, of text such as 0-9 or 3,5,7; "balanced" (every class in turn) and "data" (as often as
    in the model's data) as they are."""
    if text in ("balanced", "data"):
        return text
    labels: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (_is_number(first) and (_is_number(last) or not dash)) or int(last or first) < int(first):
            raise UserError(
                f"--classes {text!r} is not understood; use balanced, data, or labels such as 0-9 or 3,5,7"
            )
        if int(last or first) > MOST_CLASSES:
            raise UserError(f"--classes {text!r} is out of range; no model has so many classes")
        labels += range(int(first), int(last or first) + 1)
    return labels


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def sample_to(
    model: str,
    out: Path,
    console: Console,
    *,
    n: int,
    classes: str = "balanced",
    seed: int = 0,
    steps: int | None = None,
    sampler: str | None = None,
    batch_size: int = 64,
    dtype: str | None = None,
    mode: str = "auto",
    image_format: str | None = None,
    workers: int | None = None,
    device: str | None = None,
    overwrite: bool = False,
    quantize: str | None = None,
    options: dict[str, Any] | None = None,
) -> None:
    """Draws n images, or what is missing of them; all processes of a launcher together.

    Raises UserError before anything is written; Unfinished where the disk is full, say, and what is complete
    stays.
    """
    asked = parse_classes(classes)
    output = _output(out, image_format, workers)
    output.check()
    processes = Processes(None if device == "mps" else device)
    place = processes.device if processes.world > 1 else _device(device)
    denoiser = loading.load(model, device=place, dtype=_dtype(dtype, place), quantize=quantize)
    if denoiser.steps is None and steps is None:
        raise UserError(f"{model} has no step count of its own (it is no student); say --steps")
    if denoiser.steps and steps and steps != denoiser.steps:
        log.warning("%s is a student of %d steps, and is asked for %d", model, denoiser.steps, steps)
    labels = _labels(asked, denoiser, model, n)
    drawing = Drawing(
        denoiser, n, steps=steps, seed=seed, labels=labels, batch_size=batch_size, sampler=sampler, mode=mode,
        **(options or {}),
    )  # fmt: skip
    settings = {
        "model": digest(denoiser.network.state_dict()), "steps": drawing.steps, "sampler": drawing.sampler,
        **(options or {}), "seed": seed, "clip": denoiser.clip,
        "labels": asked if denoiser.num_classes is not None else None,
        "dtype": str(denoiser.dtype).removeprefix("torch."), "format": output.format,
    }  # fmt: skip
    plan: ResumePlan = processes.agree(output.plan(settings, n, overwrite) if processes.main else None)
    if plan.complete:
        if processes.main:
            output.tidy()
        _say(console, processes, f"all {n} images are there already: {out}")
        return
    _draw(drawing, output, plan, settings, overwrite, console, processes)


def _draw(
    drawing: Drawing,
    output: ImageWriter,
    plan: ResumePlan,
    settings: dict[str, Any],
    overwrite: bool,
    console: Console,
    processes: Processes,
) -> None:
    missing = plan.missing
    blocks = [k for k in range(drawing.blocks) if missing[slice(*drawing.span(k))].any()]
    mine = blocks[processes.rank :: processes.world]
    runner = drawing.prepare()
    if runner.note:
        log.warning("%s", runner.note)
    clock = drawing.clock = Clock(drawing.device)
    arrays = drawing.arrays(mine)
    begun = list(islice(arrays, 1))  # what draws nothing replaces nothing
    try:
        if processes.main:
            output.start(settings, drawing.n, overwrite, plan)
        output.warm()
        processes.wait()
        with bar(console, "images", int(missing.sum()), shown=processes.main) as advance:
            done = 0
            for block, images in zip(mine, chain(begun, arrays), strict=True):
                first, stop = drawing.span(block)
                wanted = missing[first:stop]
                with clock.host("writing"):
                    output.write(np.arange(first, stop)[wanted], images[wanted])
                done += int(wanted.sum()) * processes.world
                advance(done, f"{done / clock.elapsed():.0f} images/s")
        with clock.host("writing"):
            output.flush()
        processes.wait()
        seconds = clock.elapsed()
        if processes.main:
            grids.save(grids.grid(output.first(min(drawing.n, 64))), output.grid)
            labels = None if drawing.labels is None else drawing.labels.numpy()
            output.finish(settings, drawing.n, labels)
    except BrokenProcessPool as error:
        raise Unfinished(f"{output.out}: a worker process ended; {_state(output, drawing.n)}") from error
    except OSError as error:
        raise Unfinished(f"{output.out}: {error.strerror or error}; {_state(output, drawing.n)}") from error
    except KeyboardInterrupt:
        log.warning("interrupted; %s", _state(output, drawing.n))
        raise
    finally:
        output.close()
    _say(console, processes, f"{drawing.n} images of {drawing.steps} steps (nfe {drawing.nfe}): {output.out}")
    if missing.any():
        _say(console, processes, _speed(int(missing.sum()), seconds, drawing, runner, processes))


def _state(output: ImageWriter, n: int) -> str:
    output.close()  # what the workers have begun they end
    there = np.zeros(n, bool)
    there[output.indices()] = True
    count = f"{there.sum()} of {n} images are complete and stay"
    return f"{count}; the same command goes on" + ("" if there.all() else f" from image {there.argmin()}")


def _speed(
    count: int, seconds: float, drawing: Drawing, runner: cuda_graphs.Runner, processes: Processes
) -> str:
    rate = count / seconds
    spent = ", ".join(f"{name} {took / seconds:.1%}" for name, took in drawing.clock.seconds().items())
    dtype = str(drawing.denoiser.dtype).removeprefix("torch.")
    where = f"{drawing.device}" + (f" x {processes.world} processes" if processes.world > 1 else "")
    warm_up = f"; before that {runner.seconds:.1f} s of warm-up" if runner.seconds else ""
    return (
        f"{rate:.1f} images/s, {1000 / rate:.3f} ms an image ({where}, {dtype}, {runner.path}): {spent}"
        f"{warm_up}"
    )


def _say(console: Console, processes: Processes, text: str) -> None:
    if processes.main:
        console.print(printable(text), highlight=False, markup=False, soft_wrap=True)


def _output(out: Path, image_format: str | None, workers: int | None) -> ImageWriter:
    """Raises UserError where nothing can be written at `out`."""
    parent = next((p for p in out.absolute().parents if p.exists()), None)
    if parent is not None and not parent.is_dir():
        raise UserError(f"--out {out} is inside {parent}, which is a file; use another --out")
    if parent is not None and not os.access(parent, os.W_OK):
        raise UserError(f"--out {out} cannot be written in {parent}; use another --out")
    if out.suffix == ".npz":
        for option, value in (("--format", image_format), ("--workers", workers)):
            if value is not None:
                raise UserError(
                    f"{option} {value} is for a folder of images, and --out is {out}; leave it out"
                )
        return NpzWriter(out)
    if image_format not in (None, *FORMATS):
        raise UserError(f"--format {image_format!r} is unknown; use one of {', '.join(FORMATS)}")
    return FolderWriter(out, image_format or "png", default_workers() if workers is None else workers)


def default_workers() -> int:
    """With a GPU, whose speed one process cannot encode at, as many as there are cores to spare; else none:
    the network has the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, cores - 1) if torch.cuda.is_available() else 0


def _labels(asked: list[int] | str, denoiser: Denoiser, model: str, n: int) -> list[int] | Tensor | None:
    """What `Drawing` takes. Raises UserError for `data` where the model does not know its data's labels."""
    if isinstance(asked, list) or asked == "balanced" or denoiser.num_classes is None:
        return asked if isinstance(asked, list) else None
    counts = loading.card(loading.folder_of(model)).get("class_counts")
    if not (
        isinstance(counts, list)
        and len(counts) == denoiser.num_classes
        and all(type(count) is int and count >= 0 for count in counts)
        and any(counts)
    ):
        raise UserError(
            f"{model} does not say how often each class is in its data; use --classes balanced, or a list"
        )
    return proportional(counts, n)


def _device(name: str | None) -> torch.device:
    return usable_device(("cuda" if torch.cuda.is_available() else "cpu") if name is None else name)


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Default bfloat16 on CUDA, float32 elsewhere. Raises UserError for what the device cannot compute in."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if name not in DTYPES:
        raise UserError(f"--dtype {name!r} is unknown; use one of {', '.join(DTYPES)}")
    dtype = DTYPES[name]
    try:
        x = torch.ones(1, 8, 4, 4, device=device, dtype=dtype)
        weight = torch.ones(8, 8, 3, 3, device=device, dtype=dtype)
        torch.nn.functional.group_norm(torch.nn.functional.conv2d(x, weight), 2).sum().item()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise UserError(
            f"--dtype {name} is more than {device} can do ({reason(error)}); use float32"
        ) from error
    return dtype
