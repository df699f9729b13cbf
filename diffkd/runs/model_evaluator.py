"""How a run measures its models: against one reference, and with the teacher where a metric needs it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from diffkd.core.denoiser import Denoiser
from diffkd.data.absent import Unseen
from diffkd.data.images import Images
from diffkd.io.processes import Processes
from diffkd.methods.base import Stage
from diffkd.metrics import features
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.evaluation.evaluator import Evaluator
from diffkd.metrics.evaluation.image_sources import DataSource
from diffkd.metrics.evaluation.image_stream import (
    ImageStream,
    cached,
    default_count,
    identity,
    prompts_for,
    sampled_images,
    shared,
)
from diffkd.metrics.evaluation.reference import Reference
from diffkd.runs.config import Settings, Teacher, teacher_metric
from diffkd.runs.session import Session

PREVIEW_STEPS = 64  # of the pictures of a teacher that is not measured


def teacher_steps(evaluation: Evaluation | None, denoiser: Denoiser) -> list[int]:
    """The step counts at which to measure a model that has none of its own."""
    wanted = evaluation.teacher_steps if evaluation and evaluation.teacher_steps else [PREVIEW_STEPS]
    return [min(steps, denoiser.schedule.num_train_timesteps) for steps in wanted]


class ModelEvaluator:
    """Measures the models of one run.

    teacher: in a distillation, where the teacher is loaded from when a metric compares students with it.
    guidance: the weight that it is sampled with.
    """

    def __init__(
        self,
        session: Session,
        settings: Settings,
        images: Images | Unseen,
        teacher: Teacher | None = None,
        guidance: float = 1.0,
    ) -> None:
        assert settings.evaluation is not None
        self.session, self.config, self.data = session, settings.evaluation, settings.data
        self.images, self.teacher, self.guidance = images, teacher, guidance
        if self.config.features not in features.NAMES:  # the user's own fails now, and not after training
            features.load(self.config.features)(images.uint8(slice(2)))
        self._cost: tuple[float, float] | None = None  # seconds of a network evaluation, and of the rest

    def __call__(
        self, name: str, denoiser: Denoiser, steps: int, path: str, *, null_label: int | None, guidance: float
    ) -> dict[str, Any]:
        """{"steps", "nfe", the values, "seconds", "protocol"}; every process takes part.

        path, null_label: where the model is saved, and its null label where the config had to name it.
        """
        where, teacher = identity(denoiser, path, null_label), self._teacher_images
        stream = shared(self._sampled(denoiser, steps, guidance), where, teacher)
        started = time.monotonic()
        with self.session.image_bar(f"measuring {name} at {steps} steps", stream.count) as on_images:
            record = self._evaluator(stream, teacher=teacher, on_images=on_images)
        rest = time.monotonic() - started - record["seconds"]
        self._cost = record["seconds"] / record["nfe"], max(0.0, rest)
        record["protocol"]["target"] = where
        return record

    def seconds(self, stages: Sequence[Stage]) -> float | None:
        """How long it will take to measure the students of these stages, going by the last measurement; None
        where there was none."""
        if self._cost is None:
            return None
        drawing, rest = self._cost
        most = max(self.config.teacher_steps or [PREVIEW_STEPS])
        return sum((stage.steps or most) * drawing + rest for stage in stages)

    def _sampled(self, denoiser: Denoiser, steps: int, guidance: float) -> ImageStream:
        reference = self._evaluator.reference
        captions = reference.captions or self.images.captions  # of the reference, which may be held out
        prompts = prompts_for(denoiser, captions, default_count(self.config, reference))
        weight = None if guidance == 1.0 else guidance  # a student that takes it is measured at its usual one
        return sampled_images(denoiser, self.config, reference, steps, guidance=weight, prompts=prompts)

    @cached_property
    def _evaluator(self) -> Evaluator:
        spec = self.config.reference or self.data
        source = None
        if self.config.reference is None:
            assert isinstance(self.images, Images)
            source = DataSource(self.images)
        reference = Reference(spec, source)
        with self.session.image_bar("features of the reference", reference.count or 0) as on_images:
            return Evaluator(self.config, reference, Processes(self.session.accelerator.device), on_images)

    @cached_property
    def _teacher_images(self) -> ImageStream | None:
        """The teacher's at its highest step count. It is in memory only while it draws them."""
        if self.teacher is None or teacher_metric(self.config) is None:
            return None
        teacher = self.teacher

        def sampled() -> tuple[Denoiser, ImageStream]:
            denoiser = teacher.load(self.session.accelerator.device)
            steps = max(teacher_steps(self.config, denoiser))
            return denoiser, self._sampled(denoiser, steps, self.guidance)

        denoiser, images = sampled()
        protocol = images.protocol | identity(denoiser, str(teacher.path), teacher.null_label)
        return cached(
            ImageStream(images.count, lambda rank, world: sampled()[1].batches(rank, world), protocol)
        )
