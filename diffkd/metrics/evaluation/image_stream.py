"""What is measured, batch by batch: images that a model draws, or that exist already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffkd.core import guidance_kinds
from diffkd.core.denoiser import Denoiser
from diffkd.core.digest import digest
from diffkd.data.decoding import fitted
from diffkd.errors import UserError
from diffkd.generation.generator import ImageGenerator
from diffkd.generation.labels import labels_for
from diffkd.generation.prompts import described
from diffkd.io.naming import called
from diffkd.io.places import expanded
from diffkd.metrics.base import Labelled
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.evaluation.image_sources import WORKERS, Source, batches, subset, thinned
from diffkd.metrics.evaluation.reference import Reference
from diffkd.metrics.features import STANDARD_SAMPLES

CACHE_BYTES = 1 << 30  # of a teacher's images
Numbered = Iterator[tuple[int, Tensor]]  # index of a batch's first image, and its images, uint8 (B, H, W, C)
Batches = Callable[[int, int], Numbered]  # those that fall to process `rank` of `world`


@dataclass
class ImageStream:
    """`count` images by batches. protocol: how they came about. there: whether they are stored somewhere, so
    that their sha256 identifies them. notes: what a reader of their numbers must know. prompts: of the
    images, in turn. labels: of each image, where they have any. content: sha256 of all that stored images are
    made of."""

    count: int
    batches: Batches
    protocol: dict[str, Any] = field(default_factory=dict)
    there: bool = False
    notes: Sequence[str] = ()
    prompts: Sequence[str] | None = None
    labels: Labelled | None = None
    content: Callable[[], str] | None = None

    def prompts_of(self, first: int, count: int) -> list[str] | None:
        """Of images `first` to first + count - 1."""
        given = self.prompts
        return None if given is None else [given[i % len(given)] for i in range(first, first + count)]


def stored_images(source: Source, config: Evaluation, prompts: Sequence[str] | None = None) -> ImageStream:
    """Images of a set, as many as the config says: a fixed random choice where it has more. prompts: of the
    whole set, in turn."""
    count, size = config.samples, config.batch_size
    if count is not None and count > len(source):
        raise UserError(
            f"{source.name} has {len(source)} images and {count} are asked for; use fewer "
            f"({called('evaluation.samples')})"
        )
    chosen = thinned(source, count or len(source))
    stream = ImageStream(
        len(chosen),
        brought_to(lambda rank, world: batches(chosen, len(chosen), size, rank, world), config.image_size),
        there=True,
        notes=source.notes,
        labels=None if chosen.labels is None else Labelled(chosen.labels, chosen.classes),
        content=lambda: chosen.content() + (f" {config.image_size}" if config.image_size else ""),
    )
    if prompts is None:
        return stream
    if len(source) % len(prompts):
        raise UserError(
            f"{source.name} has {len(source):,} images and there are {len(prompts):,} prompts; give one for "
            "each image, or as many images of each prompt"
        )
    own = [prompts[i % len(prompts)] for i in subset(len(source), len(chosen)).tolist()]
    return replace(stream, prompts=own, protocol={"prompts": described(prompts)})


def sampled_images(
    denoiser: Denoiser,
    config: Evaluation,
    reference: Reference,
    steps: int,
    *,
    guidance: float | None = None,
    classes: Sequence[str] = (),
    prompts: Sequence[str] | None = None,
) -> ImageStream:
    """Images that a model draws, as many as the config says or the reference has. guidance: default none, or
    the usual weight of a model that takes it as an input. classes: names of the model's, where they are
    known. prompts: of the images, in turn."""
    count = default_count(config, reference)
    chosen, given = _labels(denoiser, config, reference, count, classes)
    labels = labels_for(denoiser, count, given)
    unguided = guidance is None or (guidance == 1.0 and denoiser.guidance_range is None)
    options: dict[str, Any] = {} if unguided else {"guidance": guidance}
    sampler = config.sampler or denoiser.sampler
    generator = ImageGenerator(  # now, so that what does not fit the model is refused early
        denoiser, count, steps=steps, seed=config.seed, labels=labels, prompts=prompts,
        batch_size=config.batch_size, sampler=sampler, **options,
    )  # fmt: skip

    def drawn(rank: int, world: int) -> Numbered:
        images = generator.batches(range(rank, generator.num_batches, world))
        return numbered(images, config.batch_size, rank, world)

    return ImageStream(count, brought_to(drawn, config.image_size), {
        "steps": steps, "nfe": generator.nfe,
        "sampler": sampler,
        "guidance": options.get("guidance", 1.0) if generator.weight is None else generator.weight,
        **({} if unguided else guided_by(denoiser)),
        "labels": chosen, "seed": config.seed,
        "clip": denoiser.clip, "dtype": str(denoiser.dtype).removeprefix("torch."),
        **({} if prompts is None else {"prompts": described(prompts)}),
    }, prompts=prompts, labels=None if labels is None else Labelled(labels, classes))  # fmt: skip


def prompts_for(denoiser: Denoiser, captions: Sequence[str], count: int) -> list[str] | None:
    """Captions for so many images, a fixed random choice; None for a model without prompts."""
    if denoiser.conditioner is None or not captions:
        return None
    return [captions[i] for i in subset(len(captions), count).tolist()]


def brought_to(batches: Batches, size: int | None) -> Batches:
    """The same with each image resized and cropped to size x size by Pillow, as one of a folder is; None for
    as they are."""
    if size is None:
        return batches

    def one(image: Tensor) -> np.ndarray:
        pixels = np.asarray(fitted(Image.fromarray(image.squeeze(2).numpy()), size, size))
        return pixels.reshape(size, size, image.shape[2])

    def resized(rank: int, world: int) -> Numbered:
        with ThreadPoolExecutor(WORKERS) as pool:
            for first, images in batches(rank, world):
                if images.shape[1:3] != (size, size):
                    images = torch.from_numpy(np.stack([*pool.map(one, images.cpu())]))
                yield first, images

    return resized


def numbered(images: Iterable[Tensor], batch_size: int, rank: int, world: int) -> Numbered:
    """Batches rank, rank + world, ... with the index of the first image of each."""
    for number, batch in enumerate(images):
        yield (rank + number * world) * batch_size, batch


def default_count(config: Evaluation, reference: Reference) -> int:
    """How many images are drawn: as many as the reference has, and at most the standard number."""
    return config.samples or min(reference.count or STANDARD_SAMPLES, STANDARD_SAMPLES)


def class_names(card: Mapping[str, Any]) -> list[str]:
    """Of the classes of a model that diffkd made, by its card; none where that does not say."""
    names = card.get("classes")
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


class Kept:
    """Batches of a teacher, with whom many students are compared: drawn once and kept, unless all of them are
    more than CACHE_BYTES. kept: by (rank, world); others of the same images may share it."""

    def __init__(self, batches: Batches, kept: dict[tuple[int, int], list[tuple[int, Tensor]]]) -> None:
        self.batches, self.kept = batches, kept

    def __call__(self, rank: int, world: int) -> Numbered:
        if (rank, world) in self.kept:
            yield from self.kept[rank, world]
            return
        drawn: list[tuple[int, Tensor]] | None = []
        for first, images in self.batches(rank, world):
            if drawn is not None:
                drawn.append((first, images))
                drawn = None if sum(len(x) for _, x in drawn) * images[0].numel() > CACHE_BYTES else drawn
            yield first, images
        if drawn is not None:
            self.kept[rank, world] = drawn


def cached(stream: ImageStream) -> ImageStream:
    """The same, kept as they are drawn."""
    return replace(stream, batches=Kept(stream.batches, {}))


def is_shared(stream: ImageStream, teacher: ImageStream) -> bool:
    """Whether the images are the teacher's own, by `shared`."""
    ours, theirs = stream.batches, teacher.batches
    return isinstance(ours, Kept) and isinstance(theirs, Kept) and ours.kept is theirs.kept


def shared(stream: ImageStream, where: Mapping[str, Any], teacher: ImageStream | None) -> ImageStream:
    """A model's images; where that is the teacher itself, drawn as it is, they are kept for the students that
    follow, unless the teacher's are there already: what they take would not be measured then.

    where: the model's `identity`.
    """
    if teacher is None or not isinstance(teacher.batches, Kept) or teacher.batches.kept:
        return stream
    named = {key: value for key, value in where.items() if key != "prompts"}  # their file; they are compared
    if teacher.protocol != {**stream.protocol, **named}:
        return stream
    return replace(stream, batches=Kept(stream.batches, teacher.batches.kept))


def identity(denoiser: Denoiser, path: str, null_label: int | None = None) -> dict[str, Any]:
    """What a protocol says of a model, enough to open it again. null_label: where it had to be named."""
    place = expanded(path)
    where = {"kind": "model", "path": str(place.resolve()) if place.exists() else path}
    more = denoiser.opened_with | ({} if null_label is None else {"null_label": null_label})
    return {**where, "sha256": digest(denoiser.network.state_dict()), **more}


def guided_by(denoiser: Denoiser) -> dict[str, Any]:
    """What a record or a card says of the kind of a model's guidance; {} for the plain kind."""
    kind = guidance_kinds.described(denoiser)
    if denoiser.worse is not None:
        kind["worse"] = identity(denoiser.worse, denoiser.worse.name)
    return {"guidance_kind": kind} if kind else {}


def _labels(
    denoiser: Denoiser, config: Evaluation, reference: Reference, count: int, classes: Sequence[str]
) -> tuple[Any, Any]:
    """(what the protocol says of the labels, the labels): the reference's own, by `image_sources.subset`."""
    if isinstance(config.labels, list):
        return config.labels, config.labels
    if denoiser.num_classes is None:
        return None, None
    labels = reference.labels_of(classes)
    if config.labels == "data" and labels is not None:
        return "data", labels[subset(len(labels), count)]
    return "balanced", None
