"""What `diffkd evaluate` measures: a model, drawn by diffkd or by its own pipeline, or a set of images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from diffkd.core.denoiser import Denoiser
from diffkd.data.decoding import SUFFIXES
from diffkd.errors import UserError
from diffkd.generation.prompts import check_prompts
from diffkd.io.naming import called, in_config
from diffkd.io.npz import PICKLES
from diffkd.io.places import expanded
from diffkd.io.prompts import read_prompts
from diffkd.metrics.evaluation import image_sets, presets
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.evaluation.image_sources import ArraySource, Source
from diffkd.metrics.evaluation.image_stream import (
    ImageStream,
    cached,
    class_names,
    default_count,
    identity,
    prompts_for,
    sampled_images,
    stored_images,
)
from diffkd.metrics.evaluation.reference import Reference
from diffkd.metrics.evaluation.stock_images import StockPipeline, stock_option
from diffkd.models import guidance_kind, loading, sizes
from diffkd.models.guidance_kind import GuidanceKind
from diffkd.models.pipeline_files import INDEX
from diffkd.models.source import ADAPTER, holds_model

AGREEMENT_STEPS = 64  # of the teacher that a student is compared with image by image


@dataclass(frozen=True)
class Target:
    """What is measured: where it is; of a model, how it is drawn and which teacher it is compared with."""

    path: str  # of what is given itself, what messages call it
    name: str | None = None  # default the last part of the path
    steps: tuple[int, ...] = ()  # none: a student's own
    guidance: float | None = None  # default none, or the usual one of a model that takes it as an input
    guidance_kind: GuidanceKind | None = None
    null_label: int | None = None
    quantize: str | None = None
    prompts: str | None = None  # a file of them, one a line, for the images in turn
    opening: Mapping[str, str] = field(default_factory=dict)  # variant and scheduler, for `loading.load`
    stock: bool = False  # drawn by the pipeline's own code
    resize: int | None = None  # of a folder of images
    teacher: str | None = None
    teacher_steps: int = AGREEMENT_STEPS
    teacher_guidance: float | None = None
    teacher_kind: GuidanceKind | None = None
    teacher_opening: Mapping[str, str] = field(default_factory=dict)
    given: Denoiser | ArraySource | None = None  # the model itself, open, or images in memory


class OpenedTarget(NamedTuple):
    """One stream of images to measure. where: enough to open it again. size: of the network, if known."""

    title: str
    stream: ImageStream
    where: dict[str, Any]
    size: Mapping[str, int] = {}


def is_model(path: str) -> bool:
    """Whether it is a pipeline: a folder with a model_index.json, or a name that only a hub can have."""
    place = expanded(path)
    if os.path.isdir(place):  # pathlib fails for a name that is too long
        return holds_model(place)
    local = path.startswith((".", "/", "~")) or path.count("/") != 1
    a_file = place.suffix.lower() in (".npz", ".json", ".yaml", *PICKLES, *SUFFIXES)
    return not local and not a_file and not os.path.exists(place)


def exists(path: str) -> bool:
    return path in image_sets.SETS or os.path.exists(expanded(path))


def teacher_of(
    target: Target, config: Evaluation, reference: Reference, device: torch.device
) -> ImageStream | None:
    """What the target is compared with image by image, drawn once however often it is used."""
    if target.teacher is None:
        return None
    denoiser = _load(target.teacher, device, target.null_label, target.teacher_kind, **target.teacher_opening)
    stream = sampled_images(
        denoiser, config, reference, target.teacher_steps, guidance=target.teacher_guidance,
        classes=class_names(loading.card(expanded(target.teacher))),
        prompts=_prompts(target, denoiser, config, reference),
    )  # fmt: skip
    stream.protocol |= identity(denoiser, target.teacher, target.null_label)
    return cached(stream)


def opened(
    target: Target, config: Evaluation, reference: Reference, device: torch.device
) -> Iterator[OpenedTarget]:
    """One for each step count of a model, or the one of a set of images."""
    if isinstance(target.given, ArraySource) or (target.given is None and not is_model(target.path)):
        yield _images(target, config)
    elif target.stock:
        yield from _stock(target, config, reference, device)
    else:
        yield from _model(target, config, reference, device)


def _images(target: Target, config: Evaluation) -> OpenedTarget:
    if isinstance(target.given, ArraySource):
        source: Source = target.given
        where: dict[str, Any] = {"kind": "memory", "path": target.path}
    else:
        source, where = _named_images(target, config)
    if target.prompts is not None and not any(metric.with_prompts for metric in config.chosen()):
        raise UserError(
            f"{called('prompts')} {target.prompts} is for metrics that compare images with their prompts; "
            "add one, such as clip_score, or leave it out"
        )
    prompts = None if target.prompts is None else read_prompts(target.prompts)
    stream = stored_images(source, config, prompts)
    if target.prompts is not None:
        where["prompts"] = _absolute(target.prompts)
    return OpenedTarget(target.path, stream, where)


def _named_images(target: Target, config: Evaluation) -> tuple[Source, dict[str, Any]]:
    """The images of that name, and where they are."""
    place = expanded(target.path)
    spec = image_sets.parse(
        target.path, resize=target.resize or config.image_size, as_stored=presets.as_stored(config.protocol)
    )
    if not exists(target.path) and place.suffix.lower() not in PICKLES:
        raise UserError(f"{target.path} does not exist; give a model, a folder of images, or an image .npz")
    if target.steps or target.teacher or target.guidance is not None:
        raise UserError(f"{target.path} is not a model: steps, guidance and teacher are for models")
    patterns = [f"{depth}/{name}" for depth in ("*", "*/*") for name in (INDEX, ADAPTER)]
    inside = sorted({str(p.parent.relative_to(place)) for one in patterns for p in place.glob(one)})
    if inside:
        raise UserError(f"{target.path} holds models ({', '.join(inside)}); name one of them")
    path = target.path if target.path in image_sets.SETS else _absolute(target.path)
    where = {"kind": "images", "path": path, "spec": spec.model_dump(mode="json")}
    return image_sets.images_of(spec), where


def _model(
    target: Target, config: Evaluation, reference: Reference, device: torch.device
) -> Iterator[OpenedTarget]:
    if isinstance(target.given, Denoiser):
        denoiser = target.given
    else:
        denoiser = _load(
            target.path, device, target.null_label, target.guidance_kind, quantize=target.quantize,
            **target.opening,
        )  # fmt: skip
    if not target.steps and denoiser.steps is None:
        name = called("steps")
        raise UserError(f"{target.path} has no step count of its own (it is not a student); say {name}")
    where = identity(denoiser, target.path, target.null_label)
    prompts = _prompts(target, denoiser, config, reference)
    presets.check_captions(config.protocol, prompts, config.samples, target.path)
    if target.quantize:
        where["quantize"] = target.quantize
    if target.prompts is not None:
        where["prompts"] = _absolute(target.prompts)
    size = sizes.drawn_size(denoiser).recorded()
    for steps in target.steps or (denoiser.steps or 0,):
        stream = sampled_images(
            denoiser,
            config,
            reference,
            steps,
            guidance=target.guidance,
            classes=class_names(loading.card(expanded(target.path))),
            prompts=prompts,
        )
        yield OpenedTarget(f"{steps} steps", stream, where, size)


def _load(
    path: str, device: torch.device, null_label: int | None, kind: GuidanceKind | None, **options: Any
) -> Denoiser:
    denoiser = loading.load(path, device=device, **options)
    if null_label is not None and denoiser.null_label is None:
        loading.set_null_label(denoiser, null_label)
    if kind is not None:
        kind.set_on(denoiser)
    return denoiser


def _prompts(
    target: Target, denoiser: Denoiser, config: Evaluation, reference: Reference
) -> list[str] | None:
    """Those of the file that the target names; without one the reference's own captions. Raises UserError
    where the model needs some and has none, or has some and takes none."""
    if target.prompts is None:
        prompts = prompts_for(denoiser, reference.captions, default_count(config, reference))
    else:
        prompts = read_prompts(target.prompts)
    check_prompts(denoiser, prompts)
    return prompts


def _stock(
    target: Target, config: Evaluation, reference: Reference, device: torch.device
) -> Iterator[OpenedTarget]:
    if target.guidance not in (None, 1):
        raise UserError(f"{stock_option()} draws as the pipeline does; leave out {called('guidance')}")
    for option, given in zip(guidance_kind.OPTIONS, _kind_of(target), strict=True):
        if given:
            name = f"guidance_kind.{option.removeprefix('guidance_')}" if in_config() else called(option)
            raise UserError(f"{stock_option()} draws as the pipeline does; leave out {name}")
    if target.quantize:
        raise UserError(f"{stock_option()} draws as the pipeline does; leave out {called('quantize')}")
    presets.check_captions(config.protocol, None, None, f"{target.path} ({stock_option()})")
    if target.prompts is not None:
        raise UserError(f"{stock_option()} draws without prompts; leave out {called('prompts')}")
    if "scheduler" in target.opening:
        raise UserError(f"{stock_option()} draws as the pipeline does; leave out {called('scheduler')}")
    pipeline = StockPipeline(target.path, target.null_label, device, target.opening.get("variant"))
    where = pipeline.identity(_absolute(target.path))
    for steps in target.steps or (pipeline.steps,):
        stream = pipeline.stream(config, reference, steps)
        yield OpenedTarget(f"{steps or 'its own'} steps", stream, where, pipeline.size)


def _kind_of(target: Target) -> tuple[Any, ...]:
    kind = target.guidance_kind
    return (None, None, None) if kind is None else (kind.interval, kind.rescale, kind.worse)


def _absolute(path: str) -> str:
    place = expanded(path)
    return str(place.resolve()) if os.path.exists(place) else path
