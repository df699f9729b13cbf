"""What can be measured: models, drawn by diffkd or by their own pipeline's code, and sets of images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffkd import models
from diffkd.base import UserError
from diffkd.denoiser import Denoiser
from diffkd.generation import generate_stock
from diffkd.metrics import sources
from diffkd.metrics.evaluation import Evaluation
from diffkd.metrics.reference import Reference
from diffkd.metrics.targets import (
    Target,
    default_count,
    identity,
    images_target,
    model_target,
    remembered,
)

TEACHER_STEPS = 64  # of the teacher that a student is compared with image by image


@dataclass(frozen=True)
class Subject:
    """What is measured: where it is, and for a model how it is drawn and with which teacher compared."""

    path: str
    steps: tuple[int, ...] = ()  # none: a student's own
    guidance: float = 1.0
    null_label: int | None = None
    stock: bool = False  # drawn by the pipeline's own code
    resize: int | None = None  # of a folder of images
    teacher: str | None = None
    teacher_steps: int = TEACHER_STEPS
    teacher_guidance: float = 1.0


class Opened(NamedTuple):
    """One set of images to be measured. where: enough to open it again. parameters: of the network."""

    title: str
    target: Target
    where: dict[str, Any]
    parameters: int | None = None


def is_model(path: str) -> bool:
    """Whether it is a pipeline: a folder with a model_index.json, or what only a hub can have."""
    place = Path(path).expanduser()
    if place.is_dir():
        return (place / "model_index.json").is_file()
    local = path.startswith((".", "/", "~")) or path.count("/") != 1 or place.suffix
    return not local and not place.exists()


def teacher_of(
    subject: Subject, how: Evaluation, reference: Reference, device: torch.device
) -> Target | None:
    """What the subject is compared with image by image, drawn once however often it is used."""
    if subject.teacher is None:
        return None
    denoiser = _load(subject.teacher, device, subject.null_label)
    target = model_target(denoiser, how, reference, subject.teacher_steps, guidance=subject.teacher_guidance)
    target.protocol |= identity(denoiser, subject.teacher, subject.null_label)
    return remembered(target)


def opened(subject: Subject, how: Evaluation, reference: Reference, device: torch.device) -> Iterator[Opened]:
    """One for each of the subject's step counts, or one of its images."""
    if not is_model(subject.path):
        yield _images(subject, how)
    elif subject.stock:
        yield from _stock(subject, how, reference, device)
    else:
        yield from _model(subject, how, reference, device)


def _images(subject: Subject, how: Evaluation) -> Opened:
    if subject.steps or subject.teacher or subject.guidance != 1:
        raise UserError(f"{subject.path} is no model: steps, guidance and teacher are for models")
    inside = sorted(p.parent.name for p in Path(subject.path).expanduser().glob("*/model_index.json"))
    if inside:
        raise UserError(f"{subject.path} holds models ({', '.join(inside)}); name one of them")
    spec = sources.parse(subject.path, resize=subject.resize)
    target = images_target(sources.images_of(spec), how.samples, how.batch_size)
    where = {"kind": "images", "path": _absolute(subject.path), "spec": spec.model_dump(mode="json")}
    return Opened(subject.path, target, where)


def _model(subject: Subject, how: Evaluation, reference: Reference, device: torch.device) -> Iterator[Opened]:
    denoiser = _load(subject.path, device, subject.null_label)
    if not subject.steps and denoiser.steps is None:
        raise UserError(f"{subject.path} has no step count of its own (it is no student); say --steps")
    where = identity(denoiser, subject.path, subject.null_label)
    parameters = sum(p.numel() for p in denoiser.network.parameters())
    for steps in subject.steps or (denoiser.steps or 0,):
        target = model_target(denoiser, how, reference, steps, guidance=subject.guidance)
        yield Opened(f"{steps} steps", target, where, parameters)


def _load(path: str, device: torch.device, null_label: int | None) -> Denoiser:
    denoiser = models.load(path, device=device)
    if null_label is not None and denoiser.null_label is None:
        models.name_null_label(denoiser, null_label)
    return denoiser


def _stock(subject: Subject, how: Evaluation, reference: Reference, device: torch.device) -> Iterator[Opened]:
    from diffusers import DiffusionPipeline

    if subject.teacher or subject.guidance != 1:
        raise UserError("--sampler stock draws as the pipeline does: guidance and teacher are not for it")
    try:
        pipeline = DiffusionPipeline.from_pretrained(subject.path, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{subject.path} cannot be opened as a diffusers pipeline ({reason})") from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline = pipeline.to(device)
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    parameters = sum(p.numel() for p in network.parameters()) if network is not None else None
    count = default_count(how, reference)
    said, labels = _stock_labels(getattr(network, "config", {}), how, reference, count)

    def target(steps: int | None) -> Target:
        def drawn(rank: int, world: int) -> Iterator[tuple[int, Tensor]]:
            images = generate_stock(
                pipeline, count, steps=steps, seed=how.seed, labels=labels, batch_size=how.batch_size,
                share=(rank, world),
            )  # fmt: skip
            for number, batch in enumerate(images):
                yield (rank + number * world) * how.batch_size, batch

        return Target(count, drawn, {
            **({"steps": steps} if steps else {}), "sampler": "stock",
            "scheduler": type(pipeline.scheduler).__name__, "labels": said, "seed": how.seed,
            "dtype": str(pipeline.dtype).removeprefix("torch."),
        })  # fmt: skip

    where = {"kind": "stock", "path": _absolute(subject.path)}
    for steps in subject.steps or (None,):
        yield Opened(f"{steps or 'its own'} steps", target(steps), where, parameters)


def _stock_labels(sizes: Any, how: Evaluation, reference: Reference, count: int) -> tuple[Any, Tensor | None]:
    """(what the protocol says of the labels, (count,)); None for a network without classes."""
    classes = sizes.get("num_class_embeds") or sizes.get("num_embeds_ada_norm")
    if not classes:
        return None, None
    said: Any = how.labels
    if isinstance(how.labels, list):
        every = torch.tensor(how.labels)
    elif how.labels == "data" and reference.labels is not None:
        every = reference.labels
    else:
        said, every = "balanced", torch.arange(classes)
    return said, every[torch.arange(count) % len(every)]


def _absolute(path: str) -> str:
    place = Path(path).expanduser()
    return str(place.resolve()) if place.exists() else path
