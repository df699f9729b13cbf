"""What is measured: images that a model draws, or that are there, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from diffkd.core import samplers
from diffkd.core.denoiser import Denoiser
from diffkd.core.digest import digest
from diffkd.errors import UserError
from diffkd.generation.drawing import generate, labels_for
from diffkd.metrics import features
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.evaluation.image_sets import Source, batches, spread, thinned
from diffkd.metrics.evaluation.reference import Reference

CACHE_BYTES = 1 << 30  # bytes of a teacher's images
Batches = Callable[[int, int], Iterator[tuple[int, Tensor]]]  # rank, world -> (first index, uint8 BHWC)


@dataclass
class ImageStream:
    """What is measured: `count` images, by batches of this process. protocol: how they came about."""

    count: int
    batches: Batches
    protocol: dict[str, Any] = field(default_factory=dict)
    there: bool = False  # whether its images lie somewhere, so that their sha256 says which they were


def stored_images(source: Source, count: int | None, batch_size: int) -> ImageStream:
    """Images that are there; `count` of them, a fixed random choice where there are more."""
    if count is not None and count > len(source):
        raise UserError(
            f"{source.name} has {len(source)} images and {count} are asked for; use fewer --samples"
        )
    chosen = thinned(source, count or len(source))
    return ImageStream(
        len(chosen), lambda rank, world: batches(chosen, len(chosen), batch_size, rank, world), there=True
    )


def sampled_images(
    denoiser: Denoiser, how: Evaluation, reference: Reference, steps: int, *, guidance: float = 1.0
) -> ImageStream:
    """Images that a model draws, as many as `how` says or the reference has."""
    count = default_count(how, reference)
    chosen, given = _labels(denoiser, how, reference, count)
    labels = labels_for(denoiser, count, given)
    options: dict[str, Any] = {} if guidance == 1.0 else {"guidance": guidance}

    def drawn(rank: int, world: int) -> Iterator[tuple[int, Tensor]]:
        images = generate(
            denoiser, count, steps=steps, seed=how.seed, labels=labels, batch_size=how.batch_size,
            sampler=how.sampler, share=(rank, world), **options,
        )  # fmt: skip
        for number, batch in enumerate(images):
            yield (rank + number * world) * how.batch_size, batch

    return ImageStream(count, drawn, {
        "steps": steps, "nfe": samplers.nfe(how.sampler, steps) * (1 if guidance == 1.0 else 2),
        "sampler": how.sampler, "guidance": guidance, "labels": chosen, "seed": how.seed,
        "clip": denoiser.clip, "dtype": str(denoiser.dtype).removeprefix("torch."),
    })  # fmt: skip


def default_count(how: Evaluation, reference: Reference) -> int:
    """How many images are drawn: as many as the reference has, and no more than is usual."""
    return how.samples or min(reference.count or features.STANDARD_SAMPLES, features.STANDARD_SAMPLES)


def cached(target: ImageStream) -> ImageStream:
    """The same, drawn once and kept, unless it is more than REMEMBERED: a teacher that many students are
    compared with."""
    kept: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}

    def batches(rank: int, world: int) -> Iterator[tuple[int, Tensor]]:
        if (rank, world) in kept:
            yield from kept[rank, world]
            return
        drawn: list[tuple[int, Tensor]] | None = []
        for first, images in target.batches(rank, world):
            if drawn is not None:
                drawn.append((first, images))
                drawn = None if sum(len(x) for _, x in drawn) * images[0].numel() > CACHE_BYTES else drawn
            yield first, images
        if drawn is not None:
            kept[rank, world] = drawn

    return ImageStream(target.count, batches, target.protocol, target.there)


def identity(denoiser: Denoiser, path: str, null_label: int | None = None) -> dict[str, Any]:
    """What a protocol says of a model, enough to open it again. null_label: where it had to be named."""
    place = Path(path).expanduser()
    where = {"kind": "model", "path": str(place.resolve()) if place.exists() else path}
    more = {} if null_label is None else {"null_label": null_label}
    return {**where, "sha256": digest(denoiser.network.state_dict()), **more}


def _labels(denoiser: Denoiser, how: Evaluation, reference: Reference, count: int) -> tuple[Any, Any]:
    """(what the protocol says of the labels, the labels): the reference's own, by `sources.spread`."""
    if isinstance(how.labels, list):
        return how.labels, how.labels
    if denoiser.num_classes is None:
        return None, None
    if how.labels == "data" and reference.labels is not None:
        return "data", reference.labels[spread(len(reference.labels), count)]
    return "balanced", None
