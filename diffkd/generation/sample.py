"""`diffkd sample`: images of a model into a folder of image files or one .npz, with a grid."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from diffkd.core import guidance_kinds
from diffkd.core.digest import digest
from diffkd.errors import Unfinished, UserError
from diffkd.generation import cuda_graphs, grids
from diffkd.generation.encoding import FORMATS
from diffkd.generation.folder_writer import FolderWriter
from diffkd.generation.generator import ImageGenerator
from diffkd.generation.labels import parse_classes, requested_labels
from diffkd.generation.npz_writer import NpzWriter
from diffkd.generation.prompts import check_prompts, described
from diffkd.generation.resume import ResumePlan
from diffkd.generation.timing import Timer
from diffkd.generation.writer import ImageWriter
from diffkd.io.places import check_writable, free_bytes, free_files
from diffkd.io.processes import Processes, usable_device
from diffkd.io.progress import bar, say
from diffkd.io.system_errors import CAUSES, system_error
from diffkd.io.text import counted, format_bytes, log, reason
from diffkd.models import loading
from diffkd.models.guidance_kind import GuidanceKind

GRID_IMAGES = 64
DEFAULT_IMAGES = 64
MAX_WORKERS = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def sample_to(
    model: str,
    out: Path,
    console: Console,
    *,
    n: int | None = None,
    classes: str = "balanced",
    prompts: Sequence[str] | None = None,
    negative: str | None = None,
    size: tuple[int, int] | None = None,
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
    variant: str | None = None,
    scheduler: str | None = None,
    guidance_kind: GuidanceKind | None = None,
    options: dict[str, Any] | None = None,
) -> None:
    """Generates n images, or those of them that are missing; all processes of a launcher share the work.

    n: default 64, with prompts one for each; n of each with prompts, image i of prompt i modulo their number.
    Raises UserError before anything is written, and Unfinished where writing fails, as on a full disk; the
    images that are complete stay.
    """
    requested = parse_classes(classes)
    writer = _open_writer(out, image_format, workers)
    writer.check()
    check_writable(writer.grid, f"the grid of --out {out},")
    processes = Processes(None if device == "mps" else device)
    place = processes.device if processes.world > 1 else _device(device)
    denoiser = loading.load(
        model, device=place, dtype=_dtype(dtype, place), quantize=quantize, variant=variant,
        scheduler=scheduler,
    )  # fmt: skip
    if denoiser.steps is None and steps is None:
        raise UserError(f"{model} has no step count of its own (it is not a student); give --steps")
    options = dict(options or {})
    for name in ("eta", "guidance"):  # of which 1 is the default, but for a model that takes its guidance
        if options.get(name) == 1.0 and (name == "eta" or denoiser.guidance_range is None):
            del options[name]
    if denoiser.conditioner is not None and not prompts:
        raise UserError(f"{model} draws from prompts; give --prompt, or a file of them by --prompts")
    if guidance_kind is not None:
        guidance_kind.check_weights([options.get("guidance")])
        guidance_kind.set_on(denoiser)
    check_prompts(denoiser, prompts, negative)
    n = DEFAULT_IMAGES if n is None and not prompts else (n or 1) * len(prompts or (None,))
    labels = requested_labels(requested, denoiser, model, n)
    generator = ImageGenerator(
        denoiser, n, steps=steps, seed=seed, labels=labels, prompts=prompts, negative=negative, size=size,
        batch_size=batch_size, sampler=sampler, mode=mode, **options,
    )  # fmt: skip
    writer.prompts = prompts
    settings = {
        "model": digest(denoiser.network.state_dict()), "steps": generator.steps,
        "sampler": generator.sampler, **options, "seed": seed, "clip": denoiser.clip,
        "labels": requested if denoiser.num_classes is not None else None,
        "dtype": str(denoiser.dtype).removeprefix("torch."), "format": writer.format,
        **denoiser.opened_with,
    }  # fmt: skip
    if kind := guidance_kinds.described(denoiser):
        settings["guidance_kind"] = kind
    if prompts:
        settings |= {"prompts": described(prompts), "negative": negative, "size": [*generator.size]}
        settings |= {key: value.key for key, value in denoiser.around.items()}
    plan: ResumePlan = processes.agree(writer.plan(settings, n, overwrite) if processes.main else None)
    if plan.complete:
        if processes.main:
            writer.tidy()
            say(console, f"all {n} images exist already: {out}")
        return
    if processes.main:
        _check_room(writer, plan, generator)
    _generate(generator, writer, plan, settings, overwrite, console, processes)


def _generate(
    generator: ImageGenerator,
    writer: ImageWriter,
    plan: ResumePlan,
    settings: dict[str, Any],
    overwrite: bool,
    console: Console,
    processes: Processes,
) -> None:
    """Generates the missing images of the plan, writes them, and reports the speed."""
    missing = plan.missing
    batches = [k for k in range(generator.num_batches) if missing[slice(*generator.image_range(k))].any()][
        processes.rank :: processes.world
    ]
    runner = generator.prepare()
    if runner.note:
        log.warning("%s", runner.note)
    timer = generator.timer = Timer(generator.device)
    arrays = generator.arrays(batches)
    first = list(islice(arrays, 1))  # a model that cannot generate replaces nothing
    try:
        if processes.main:
            writer.start(settings, generator.n, overwrite, plan)
        writer.warm()
        processes.wait()
        with bar(console, "images", int(missing.sum()), shown=processes.main) as advance:
            done = 0
            for batch, images in zip(batches, chain(first, arrays), strict=True):
                start, stop = generator.image_range(batch)
                wanted = missing[start:stop]
                with timer.host("writing"):
                    writer.write(np.arange(start, stop)[wanted], images[wanted])
                done += int(wanted.sum()) * processes.world
                advance(done, f"{done / timer.elapsed():.0f} images/s")
        with timer.host("writing"):
            writer.flush()
        processes.wait()
        seconds = timer.elapsed()
        if processes.main:
            grids.save(grids.grid(writer.first(min(generator.n, GRID_IMAGES)), writer.prompts), writer.grid)
            labels = None if generator.labels is None else generator.labels.numpy()
            writer.finish(settings, generator.n, labels)
    except BrokenProcessPool as error:
        raise Unfinished(f"{writer.out}: a worker process died; {_progress(writer, generator.n)}") from error
    except OSError as error:
        number = system_error(error)
        why = CAUSES[number].why if number in CAUSES else reason(error)
        raise Unfinished(f"{writer.out}: {why}; {_progress(writer, generator.n)}") from error
    except KeyboardInterrupt:
        log.warning("interrupted; %s", _progress(writer, generator.n))
        raise
    finally:
        writer.close()
    if processes.main:
        steps, nfe = generator.steps, generator.nfe
        say(console, f"{counted(generator.n, 'image')} in {counted(steps, 'step')} (nfe {nfe}): {writer.out}")
        if missing.any():
            say(console, _speed(int(missing.sum()), seconds, generator, runner, processes))


def _check_room(writer: ImageWriter, plan: ResumePlan, generator: ImageGenerator) -> None:
    """Raises Unfinished, before anything is drawn, where the disk surely has no room for what is missing."""
    where, missing = writer.out.absolute().parent, int(plan.missing.sum())
    if writer.format == "npz":  # the parts, and then all of it
        channels = generator.shape[0] if generator.denoiser.codec is None else 3
        size, room = (missing + len(plan.missing)) * channels * math.prod(generator.size), free_bytes(where)
        if size > room:
            needs = f"{format_bytes(size)}, and the disk has {format_bytes(room)}"
            raise Unfinished(f"--out {writer.out} needs {needs}; make room, or use another place")
    elif missing > (files := free_files(where)):
        needs = f"{missing} files, and the disk has room for {files} more"
        raise Unfinished(f"--out {writer.out} needs {needs}; use one .npz")


def _progress(writer: ImageWriter, n: int) -> str:
    """How many images are complete, after the workers have finished what they had begun."""
    writer.close()
    existing = np.zeros(n, bool)
    existing[writer.indices()] = True
    where = "" if existing.all() else f" from image {existing.argmin()}"
    return f"{existing.sum()} of {n} images are complete and stay; the same command resumes{where}"


def _speed(
    count: int,
    seconds: float,
    generator: ImageGenerator,
    runner: cuda_graphs.Runner,
    processes: Processes,
) -> str:
    rate = count / seconds
    shares = ", ".join(f"{name} {spent / seconds:.1%}" for name, spent in generator.timer.seconds().items())
    dtype = str(generator.denoiser.dtype).removeprefix("torch.")
    where = f"{generator.device}" + (f" x {processes.world} processes" if processes.world > 1 else "")
    warm_up = f"; before that {runner.seconds:.1f} s of warm-up" if runner.seconds else ""
    return (
        f"{rate:.1f} images/s, {1000 / rate:.3f} ms an image ({where}, {dtype}, {runner.path}): {shares}"
        f"{warm_up}"
    )


def _open_writer(out: Path, image_format: str | None, workers: int | None) -> ImageWriter:
    """Raises UserError where nothing can be written at `out`."""
    check_writable(out, "--out", folder=out.suffix != ".npz")
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
    """Encoding processes. With a GPU, which is faster than one process can encode, as many as there are spare
    cores; else none, since the network uses the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, cores - 1) if torch.cuda.is_available() else 0


def _device(name: str | None) -> torch.device:
    return usable_device(("cuda" if torch.cuda.is_available() else "cpu") if name is None else name)


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Default bfloat16 on CUDA, else float32. Raises UserError where the device cannot compute in it."""
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
            f"--dtype {name} is not supported on {device} ({reason(error)}); use float32"
        ) from error
    return dtype
