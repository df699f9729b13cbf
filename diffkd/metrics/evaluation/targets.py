"""What can be measured: models, drawn by diffkd or by their own pipeline's code, and sets of images."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffkd.core.denoiser import Denoiser
from diffkd.core.digest import digest
from diffkd.data.decoding import SUFFIXES
from diffkd.errors import UserError
from diffkd.generation.stock import generate_stock, scalars, stock_defaults
from diffkd.io.npz import PICKLES
from diffkd.metrics import features
from diffkd.metrics.evaluation import image_sets
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.evaluation.image_stream import (
    ImageStream,
    cached,
    default_count,
    identity,
    sampled_images,
    stored_images,
)
from diffkd.metrics.evaluation.reference import Reference
from diffkd.models import loading, sizes

AGREEMENT_STEPS = 64  # of the teacher that a student is compared with image by image


@dataclass(frozen=True)
class Target:
    """What is measured: where it is, and for a model how it is drawn and with which teacher compared."""

    path: str
    name: str | None = None  # default the last part of the path
    steps: tuple[int, ...] = ()  # none: a student's own
    guidance: float = 1.0
    null_label: int | None = None
    quantize: str | None = None
    stock: bool = False  # drawn by the pipeline's own code
    resize: int | None = None  # of a folder of images
    teacher: str | None = None
    teacher_steps: int = AGREEMENT_STEPS
    teacher_guidance: float = 1.0


class OpenedTarget(NamedTuple):
    """One set of images to be measured. where: enough to open it again. size: parameters and MACs of the
    network, as far as they are known."""

    title: str
    target: ImageStream
    where: dict[str, Any]
    size: Mapping[str, int] = {}


def is_model(path: str) -> bool:
    """Whether it is a pipeline: a folder with a model_index.json, or what only a hub can have."""
    place = Path(path).expanduser()
    if os.path.isdir(place):  # pathlib fails for a name that is too long
        return (place / "model_index.json").is_file()
    local = path.startswith((".", "/", "~")) or path.count("/") != 1
    a_file = place.suffix.lower() in (".npz", ".json", ".yaml", *PICKLES, *SUFFIXES)
    return not local and not a_file and not os.path.exists(place)


def exists(path: str) -> bool:
    return path == "digits" or os.path.exists(Path(path).expanduser())


def teacher_of(
    subject: Target, how: Evaluation, reference: Reference, device: torch.device
) -> ImageStream | None:
    """What the subject is compared with image by image, drawn once however often it is used."""
    if subject.teacher is None:
        return None
    denoiser = _load(subject.teacher, device, subject.null_label)
    target = sampled_images(
        denoiser, how, reference, subject.teacher_steps, guidance=subject.teacher_guidance
    )
    target.protocol |= identity(denoiser, subject.teacher, subject.null_label)
    return cached(target)


def opened(
    subject: Target, how: Evaluation, reference: Reference, device: torch.device
) -> Iterator[OpenedTarget]:
    """One for each of the subject's step counts, or one of its images."""
    if not is_model(subject.path):
        yield _images(subject, how)
    elif subject.stock:
        yield from _stock(subject, how, reference, device)
    else:
        yield from _model(subject, how, reference, device)


def _images(subject: Target, how: Evaluation) -> OpenedTarget:
    place = Path(subject.path).expanduser()
    spec = image_sets.parse(subject.path, resize=subject.resize)
    if not exists(subject.path) and place.suffix.lower() not in PICKLES:
        raise UserError(f"{subject.path} is not there; give a model, a folder of images, or an image .npz")
    if subject.steps or subject.teacher or subject.guidance != 1:
        raise UserError(f"{subject.path} is no model: steps, guidance and teacher are for models")
    found = [*place.glob("*/model_index.json"), *place.glob("*/*/model_index.json")]
    inside = sorted(str(p.parent.relative_to(place)) for p in found)
    if inside:
        raise UserError(f"{subject.path} holds models ({', '.join(inside)}); name one of them")
    target = stored_images(image_sets.images_of(spec), how.samples, how.batch_size)
    path = "digits" if subject.path == "digits" else _absolute(subject.path)
    return OpenedTarget(
        subject.path, target, {"kind": "images", "path": path, "spec": spec.model_dump(mode="json")}
    )


def _model(
    subject: Target, how: Evaluation, reference: Reference, device: torch.device
) -> Iterator[OpenedTarget]:
    denoiser = _load(subject.path, device, subject.null_label, subject.quantize)
    if not subject.steps and denoiser.steps is None:
        raise UserError(f"{subject.path} has no step count of its own (it is no student); say --steps")
    where = identity(denoiser, subject.path, subject.null_label)
    if subject.quantize:
        where["quantize"] = subject.quantize
    size = sizes.denoiser_size(denoiser).recorded()
    for steps in subject.steps or (denoiser.steps or 0,):
        target = sampled_images(denoiser, how, reference, steps, guidance=subject.guidance)
        yield OpenedTarget(f"{steps} steps", target, where, size)


def _load(path: str, device: torch.device, null_label: int | None, quantize: str | None = None) -> Denoiser:
    denoiser = loading.load(path, device=device, quantize=quantize)
    if null_label is not None and denoiser.null_label is None:
        loading.name_null_label(denoiser, null_label)
    return denoiser


def _stock(
    subject: Target, how: Evaluation, reference: Reference, device: torch.device
) -> Iterator[OpenedTarget]:
    """By the pipeline's own code. Its card, where it is a student of ours, says its steps and its classes."""
    if subject.guidance != 1:
        raise UserError("--sampler stock draws as the pipeline does: --guidance is not for it")
    if subject.quantize:
        raise UserError("--sampler stock draws as the pipeline does: --quantize is not for it")
    if not 0 <= how.seed < 2**63 - features.STANDARD_SAMPLES:
        raise UserError(f"seed {how.seed} is out of range; use 0 to {2**63 - features.STANDARD_SAMPLES - 1}")
    pipeline = loading.open_stock(subject.path).to(device)
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    size = {} if network is None else {"parameters": sum(p.numel() for p in network.parameters())}
    card = loading.card(Path(subject.path).expanduser())
    count = default_count(how, reference)
    said, labels = _stock_labels(pipeline, network, card, subject, how, reference, count)
    config = scalars(dict(pipeline.scheduler.config))
    scheduler = {"name": type(pipeline.scheduler).__name__, **config}
    where: dict[str, Any] = {"kind": "stock", "path": _absolute(subject.path)}
    if network is not None:
        where["sha256"] = digest(network.state_dict())
    if subject.null_label is not None:
        where["null_label"] = subject.null_label

    def target(steps: int | None) -> ImageStream:
        def drawn(rank: int, world: int) -> Iterator[tuple[int, Tensor]]:
            images = generate_stock(
                pipeline, count, steps=steps, seed=how.seed, labels=labels, batch_size=how.batch_size,
                share=(rank, world),
            )  # fmt: skip
            for number, batch in enumerate(images):
                yield (rank + number * world) * how.batch_size, batch

        return ImageStream(count, drawn, {
            **({"steps": steps} if steps else {}), "sampler": "stock", "scheduler": scheduler,
            "pipeline": {"name": type(pipeline).__name__, **stock_defaults(pipeline)},
            "labels": said, "seed": how.seed, "dtype": str(pipeline.dtype).removeprefix("torch."),
        })  # fmt: skip

    for steps in subject.steps or (card.get("steps"),):
        yield OpenedTarget(f"{steps or 'its own'} steps", target(steps), where, size)


def _stock_labels(
    pipeline: Any,
    network: Any,
    card: dict[str, Any],
    subject: Target,
    how: Evaluation,
    reference: Reference,
    count: int,
) -> tuple[Any, Tensor | None]:
    """(what the protocol says of the labels, (count,)); None for a network without classes."""
    sizes = getattr(network, "config", {})
    total = sizes.get("num_class_embeds") or sizes.get("num_embeds_ada_norm")
    null = card.get("null_label", subject.null_label)
    classes = card.get("num_classes") or (total - 1 if total and null == total - 1 else total)
    if not classes:
        if isinstance(how.labels, list):
            raise UserError("class labels were given, and this model is unconditional; leave them out")
        return None, None
    if "class_labels" not in inspect.signature(pipeline.__call__).parameters:
        raise UserError(
            f"{subject.path} has {classes} classes, and a {type(pipeline).__name__} takes no class labels; "
            "leave out --sampler stock"
        )
    said: Any = how.labels
    if isinstance(how.labels, list):
        every = torch.tensor(how.labels)[torch.arange(count) % len(how.labels)]
    elif how.labels == "data" and reference.labels is not None:
        every = reference.labels[image_sets.spread(len(reference.labels), count)]
    else:
        said, every = "balanced", torch.arange(count) % classes
    if not 0 <= int(every.min()) <= int(every.max()) < classes:
        wrong = int(every.min()) if int(every.min()) < 0 else int(every.max())
        raise UserError(f"class label {wrong} is out of range; this model has labels 0 to {classes - 1}")
    return said, every


def _absolute(path: str) -> str:
    place = Path(path).expanduser()
    return str(place.resolve()) if os.path.exists(place) else path
