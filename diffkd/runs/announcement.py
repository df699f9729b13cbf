"""What a run says before it works: what it read, what it will train, what it will measure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffkd.core import guidance_kinds
from diffkd.core.denoiser import Denoiser
from diffkd.data.absent import Unseen
from diffkd.data.buckets import BucketedImages
from diffkd.data.images import Images
from diffkd.errors import UserError, printable
from diffkd.io.text import a_or_an, counted
from diffkd.methods.base import Stage
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.evaluation.image_stream import guided_by
from diffkd.metrics.features import STANDARD_SAMPLES
from diffkd.models import pipeline_files

NAMED = 16  # classes that are named; of more the first and the last


def data(images: Images | Unseen) -> str:
    """Count, size, and the classes in their order."""
    if isinstance(images, Unseen):
        if images.captions:
            return f"data: {counted(len({*images.captions}), 'different prompt')} ({images.name}), no images"
        counts = images.class_counts
        drawn = "drawn alike" if len({*counts}) == 1 else f"drawn as {', '.join(map(str, counts[:NAMED]))}"
        return "data: none" + (f"; labels of {len(counts)} classes, {drawn}" if counts else "")
    channels, height, width = images.shape
    colour = {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")
    held = [_classes(images)] if images.labels is not None or not images.captions else []
    if images.captions:
        held.append(f"{counted(len({*images.captions}), 'different caption')}")
    size = f"{width}x{height}"
    if isinstance(images, BucketedImages):
        size = ", ".join(f"{part.shape[2]}x{part.shape[1]} ({len(part):,})" for part in images.parts[:NAMED])
        size += ", ..." * (len(images.parts) > NAMED)
    return f"data: {len(images):,} images of {size}, {colour} ({images.name}); {', '.join(held)}"


def draws(count: int, steps: int, guidance: float) -> str:
    """Of what a teacher draws in place of a dataset."""
    guided = "" if guidance == 1 else f", guidance {guidance:g}"
    return f"in place of images: {count:,} that the teacher draws in {counted(steps, 'step')}{guided}"


def _classes(images: Images) -> str:
    if images.labels is None:
        return "no classes"
    names = [printable(name) for name in images.classes]
    shown = names if len(names) <= NAMED else [*names[: NAMED - 1], "...", names[-1]]
    listed = f"{len(names)} class{'es' * (len(names) != 1)}: {', '.join(shown)}"
    if all(name.isdecimal() for name in names) and names != sorted(names, key=int):
        listed += " (data.class_order: number sorts them as numbers)"
    return listed


def teacher(denoiser: Denoiser, path: str, images: Images | Unseen) -> str:
    """What kind it is, and what it does with the data's labels."""
    pipeline, scheduler = _kinds(path)
    parameters = sum(p.numel() for p in denoiser.network.parameters())
    said = [f"teacher: {path}" + (f", {a_or_an(pipeline)} with {scheduler}" if pipeline else "")]
    said += [f"{parameters / 1e6:.3g} M parameters", f"predicts {denoiser.prediction}"]
    said += [f"T = {denoiser.schedule.num_train_timesteps}", f"drawn by {denoiser.sampler}"]
    if denoiser.steps:
        said.append(f"a student of {counted(denoiser.steps, 'step')} itself")
    if denoiser.guidance_baked_in != 1:
        said.append(f"guidance {denoiser.guidance_baked_in:g} baked in")
    if kind := guided_by(denoiser):
        said.append(f"guided {guidance_kinds.in_words(kind['guidance_kind'])}")
    if denoiser.guidance_range is not None:
        least, largest = denoiser.guidance_range
        said.append(f"takes guidance from {least:g} to {largest:g}")
    if denoiser.conditioner is not None:
        said.append("draws from prompts")
    elif denoiser.num_classes is not None:
        said.append(f"{denoiser.num_classes} classes")
    else:
        ignored = "; the data's labels are ignored" if images.labels is not None else ""
        said.append(f"unconditional{ignored}")
    return ", ".join(said)


def _kinds(path: str) -> tuple[str, str]:
    """Classes of a pipeline and of its scheduler, by its index; "" where it has none here."""
    from huggingface_hub import try_to_load_from_cache

    index = Path(path, pipeline_files.INDEX)
    try:
        if not index.is_file():
            index = Path(try_to_load_from_cache(path, pipeline_files.INDEX) or "")
        content = pipeline_files.read_object(index)
        return printable(str(content["_class_name"])), printable(str(content["scheduler"][-1]))
    except (UserError, OSError, ValueError, TypeError, LookupError):  # such as a bare unet/
        return "", ""


def students(stages: Sequence[tuple[str, Stage]]) -> str:
    """stages: of all methods in order, with the method's name."""
    updates, named = sum(stage.updates for _, stage in stages), []
    for method, stage in stages:
        most_first = sorted(stage.students, key=lambda one: one.steps or 0, reverse=True)
        names = " and ".join(printable(one.name) for one in most_first)
        named.append(f"{names} ({method}, {stage.updates:,})")
    return f"students: {', '.join(named)}; {updates:,} updates in all"


def measured(evaluation: Evaluation | None, steps: Sequence[int], count: int, *, students: bool) -> str:
    """steps: of the teacher. count: of the data's images, as many of which are drawn by default."""
    if evaluation is None:
        return "measured: nothing (evaluation: null)"
    drawn = evaluation.samples or (None if evaluation.reference else min(count, STANDARD_SAMPLES))
    images = "as many images of each as the reference has" if drawn is None else f"{drawn:,} images of each"
    what = f"{', '.join(evaluation.metrics)} by {evaluation.features} features, {images}"
    each = ", each student at its own steps" if students else ""
    return f"measured: {what}: the teacher at {', '.join(map(str, steps))} steps{each}"
