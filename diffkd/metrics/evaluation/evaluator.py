"""Sets of images measured against one reference: every number with its whole protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffkd.errors import UserError
from diffkd.generation.timing import Timer
from diffkd.io.environment import commit, versions
from diffkd.io.naming import called
from diffkd.io.places import expanded
from diffkd.io.processes import Processes
from diffkd.metrics.base import MAIN, Inputs, Labelled, Metric
from diffkd.metrics.evaluation import networks, presets
from diffkd.metrics.evaluation.collector import Collection, Pixels
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.evaluation.feature_cache import Keeper
from diffkd.metrics.evaluation.image_stream import ImageStream, is_shared
from diffkd.metrics.evaluation.notes import notes
from diffkd.metrics.evaluation.reference import Reference


def ignore(count: int) -> None:
    """Where nobody follows the progress."""


class Evaluator:
    """Measures one set of images after another against one reference, whose part is done once."""

    def __init__(
        self,
        config: Evaluation,
        reference: Reference,
        processes: Processes,
        on_images: Callable[[int], None] = ignore,
    ) -> None:
        """on_images: called with the number of images of the reference that were just read."""
        self.config, self.reference, self.processes = config, reference, processes
        self.metrics = config.chosen()
        modules, self.descriptions = networks.load(config, self.metrics)
        self.networks: dict[str, Any] = {key: m.to(processes.device) for key, m in modules.items()}
        needed = networks.of_reference(self.metrics)
        stored = networks.stored_of_reference(self.metrics)
        if reference.has_features:
            stored |= networks.preferred_of_reference(self.metrics)
        real = {} if not reference.is_there else reference.collect(
            {key: network for key, network in self.networks.items() if key in needed},
            {key: found for key, found in self.descriptions.items() if key in needed},
            stored, processes,
            batch_size=config.batch_size, allow_mismatch=config.allow_mismatch, on_images=on_images,
        )  # fmt: skip
        self.real = {
            key: replace(found, stored=None if found.stored is None else found.stored.to(processes.device))
            for key, found in real.items()
        }
        for found in self.real.values():
            _ = found.gaussian  # factored once; a covariance that is not one is refused here

    def __call__(
        self,
        stream: ImageStream,
        *,
        teacher: ImageStream | None = None,
        on_images: Callable[[int], None] = ignore,
    ) -> dict[str, Any]:
        """{"steps", "nfe", the values, "seconds", "notes", "protocol"}.

        teacher: what draws from the same noise.
        """
        device, add = self.processes.device, self.processes.add
        comparing = next((metric.name for metric in self.metrics if metric.with_teacher), None)
        if comparing is None:
            teacher = None
        elif teacher is None:
            name = called("teacher")
            raise UserError(f"{comparing} is with a teacher from the same noise; name it ({name})")
        check_prompts(self.metrics, stream.prompts)
        check_labels(self.metrics, stream.labels, self.reference.labelled)
        stored, keeper = networks.stored_of_images(self.metrics), self._keeper(stream)
        if keeper is not None:
            stored = set(self.networks)
        known = {} if keeper is None else keeper.known
        collection = Collection(self.metrics, self.networks, stream.count, device, stored, known)
        pixels, sizes = Pixels(stream.count), set[tuple[int, int]]()
        timer = Timer(device)
        for first, images, by_teacher in self._pairs(stream, teacher, timer):
            sizes.add((images.shape[2], images.shape[1]))
            if stream.there:
                pixels.update(first, images)
            if teacher is not None and by_teacher is not None:
                _check_shapes(images, by_teacher, teacher)
                by_teacher = by_teacher.to(device)
            collection.update(first, images.to(device), by_teacher, stream.prompts_of(first, len(images)))
            on_images(len(images))
        collection.merge_across(add)
        if stream.there:
            pixels.merge_across(add)
            stream.protocol["pixels"] = pixels.sha256
        if keeper is not None:
            keeper.keep(collection.features(), pixels)
        made: dict[str, Any] = {k: stream.protocol[k] for k in ("steps", "nfe") if k in stream.protocol}
        values, told = self._values(collection, stream) if self.processes.main else ({}, [])
        found = notes(
            self.reference, self.descriptions[MAIN], values, stream.count,
            sizes.pop() if len(sizes) == 1 else None,
            pixels if stream.there else None,
        )  # fmt: skip
        return {
            **made, **values, "seconds": timer.seconds()["images"],
            "notes": [
                *self.reference.notes, *stream.notes, *found, *told,
                *presets.notes(self.config.protocol, stream.count),
            ],
            "protocol": self._protocol(stream, teacher),
        }  # fmt: skip

    def _keeper(self, stream: ImageStream) -> Keeper | None:
        """Of the images' features, where they are stored images and a folder for features was named."""
        if stream.content is None or not isinstance(self.reference.cached, str):
            return None
        return Keeper(
            self.reference.cached, stream.content(), stream.count, self.networks, self.descriptions,
            self.config.batch_size, self.processes,
        )  # fmt: skip

    def _pairs(
        self, stream: ImageStream, teacher: ImageStream | None, timer: Timer
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """(index of the first, images, the teacher's from the same noise) of this process."""
        place = self.processes.rank, self.processes.world
        drawn = timer.iterate("images", stream.batches(*place))
        if teacher is None:
            for first, images in drawn:
                yield first, images, None
        elif is_shared(stream, teacher):
            for first, images in drawn:
                yield first, images, images
        else:
            for (first, images), (_, by_teacher) in zip(drawn, teacher.batches(*place), strict=True):
                yield first, images, by_teacher

    def _values(self, collection: Collection, stream: ImageStream) -> tuple[dict[str, Any], list[str]]:
        """The numbers, and what the metrics say of them."""
        features, options = collection.features(), self._options(stream.count)
        values: dict[str, Any] = {}
        told: list[str] = []
        for metric in self.metrics:
            key, running = metric.network, collection.running.get(metric.name)
            real, used = self.real.get(key), options[metric.name]
            inputs = Inputs(
                features[key],
                real,
                used,
                self.config.features,
                running,
                stream.labels,
                self.reference.labelled,
            )
            values |= metric.compute(inputs)
            told += metric.notes(inputs)
        return values, told

    def _options(self, count: int) -> dict[str, Any]:
        return {metric.name: metric.options(count, self.reference.count) for metric in self.metrics}

    def _protocol(self, stream: ImageStream, teacher: ImageStream | None) -> dict[str, Any]:
        config, device = self.config, self.processes.device
        return {
            "features": self.descriptions[MAIN],
            "more_features": {key: d for key, d in self.descriptions.items() if key != MAIN},
            "samples": stream.count, "image_size": config.image_size, "reference": self.reference.describe(),
            "metrics": self._options(stream.count),
            **stream.protocol, "teacher": teacher.protocol if teacher else None,
            "batch_size": config.batch_size, "device": device.type, "processes": self.processes.world,
            "threads": torch.get_num_threads(), "versions": versions(), "commit": commit(),
            "evaluation": self._located(),
        }  # fmt: skip

    def _located(self) -> dict[str, Any]:
        """The config, with absolute paths, so that the record can be used from anywhere."""
        content = self.config.model_dump(mode="json")
        for key, value in content.items():
            if key.endswith("weights") and value is not None and expanded(value).exists():
                content[key] = str(expanded(value).resolve())
        return content | {"reference": None}  # it is in the protocol already


def check_prompts(metrics: Sequence[Metric], prompts: Sequence[str] | None) -> None:
    """Raises UserError for metrics that compare images with their prompts, and have none to go by."""
    for metric in metrics:
        if metric.with_prompts and prompts is None:
            raise UserError(
                f"{metric.name} compares images with their prompts, and these have none; give "
                f"{called('prompts')}, or leave the metric out"
            )
        if prompts is not None:
            metric.check_prompts(prompts)


def check_labels(metrics: Sequence[Metric], images: Labelled | None, reference: Labelled | None) -> None:
    """Raises UserError for metrics that go class by class, where labels are missing or do not match."""
    for metric in metrics:
        if not metric.with_labels:
            continue
        for what, given in (("the images have", images), ("the reference has", reference)):
            if given is None:
                raise UserError(
                    f"{metric.name} goes class by class, and {what} no class labels; sort them into a "
                    "subfolder for each class, or leave the metric out"
                )
        assert images is not None and reference is not None
        metric.check_labels(images, reference)


def _check_shapes(images: Tensor, by_teacher: Tensor, teacher: ImageStream) -> None:
    if by_teacher.shape != images.shape:
        raise UserError(
            f"the teacher {teacher.protocol.get('path', '')} draws images of {_size(by_teacher)} and "
            f"the model of {_size(images)} (height x width x channels); agreement needs a teacher of the "
            "same size"
        )


def _size(images: Tensor) -> str:
    return "x".join(map(str, images.shape[1:]))
