"""Targets measured one after another: over all processes, with progress on a console."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from diffkd.errors import UserError, printable
from diffkd.io import progress
from diffkd.io.naming import called
from diffkd.io.processes import Processes
from diffkd.metrics.evaluation import presets
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.evaluation.evaluator import Evaluator, check_labels, check_prompts
from diffkd.metrics.evaluation.image_stream import ImageStream, shared
from diffkd.metrics.evaluation.records import Record
from diffkd.metrics.evaluation.reference import Reference
from diffkd.metrics.evaluation.targets import Target, opened, teacher_of


class Measurement:
    """Measures targets against one reference, whose features are computed once."""

    def __init__(
        self, config: Evaluation, reference: Reference, processes: Processes, console: Console
    ) -> None:
        presets.check_reference(config.protocol, reference)
        self.config, self.reference = config, reference
        self.console, self.processes = console, processes
        self._teachers: dict[Any, ImageStream | None] = {}  # the last one, which may hold its images

    @cached_property
    def evaluator(self) -> Evaluator:
        """When it is first asked for, the reference's images go through the feature networks."""
        total, processes = self.reference.count or 0, self.processes
        shown = processes.main and self.reference.is_there
        with progress.bar(self.console, "reference", total, shown=shown) as advance:
            counter = progress.counter(advance, processes.world)
            made = Evaluator(self.config, self.reference, processes, counter)
        if self.reference.from_cache and processes.main:
            progress.say(self.console, "features of the reference: kept from an earlier command")
        return made

    def records(
        self, target: Target, *, warm_up: bool = False, expected: str | None = None
    ) -> Iterator[Record]:
        """A record for each of the target's step counts, or for its images.

        warm_up: draws a batch before, so that the cost of the first is not in "seconds". expected: the sha256
        that a model's weights, or the images, must have. Raises UserError, naming the target; whatever can be
        known without the feature networks, before they are used.
        """
        processes = self.processes
        place = target, self.config, self.reference, processes.device
        for title, stream, where, size in opened(*place):
            check_sha256(expected, where.get("sha256"), target.path)
            teacher = self._teacher(*place)
            self._check(stream, teacher)
            stream = shared(stream, where, teacher)
            evaluator = self.evaluator
            with progress.bar(self.console, printable(title), stream.count, shown=processes.main) as advance:
                try:
                    if warm_up:
                        next(stream.batches(processes.rank, processes.world), None)
                    counter = progress.counter(advance, processes.world)
                    found = evaluator(stream, teacher=teacher, on_images=counter)
                except UserError as error:
                    raise UserError(f"{target.path}: {error}") from error
            pixels = found["protocol"].pop("pixels", None)
            found["protocol"]["target"] = {**where, **({} if pixels is None else {"sha256": pixels})}
            check_sha256(expected, found["protocol"]["target"].get("sha256"), target.path)
            name = printable(target.name or Path(target.path).name or target.path)
            yield {"model": name, "role": "evaluated", **size, **found}

    def _check(self, stream: ImageStream, teacher: ImageStream | None) -> None:
        """Raises UserError for metrics that have too few images, or no prompts or teacher to compare with."""
        check_prompts(self.config.chosen(), stream.prompts)
        check_labels(self.config.chosen(), stream.labels, self.reference.labelled)
        for metric in self.config.chosen():
            metric.options(stream.count, self.reference.count)
            if metric.with_teacher and teacher is None:
                raise UserError(
                    f"{metric.name} is with a teacher from the same noise; name it ({called('teacher')})"
                )

    def _teacher(self, target: Target, *place: Any) -> ImageStream | None:
        key = (
            target.teacher, target.teacher_steps, target.teacher_guidance, target.teacher_kind,
            target.null_label,
        )  # fmt: skip
        if key not in self._teachers:
            self._teachers = {key: teacher_of(target, *place)}
        return self._teachers[key]


def check_sha256(expected: str | None, found: str | None, what: str) -> None:
    """Raises UserError where something is not what was measured."""
    if expected and found and expected != found:
        raise UserError(
            f"{what} is not what was measured (sha256 {expected[:12]} then, {found[:12]} now); "
            "restore the original, or measure again without --repeat"
        )
