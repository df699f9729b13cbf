"""Consistency models (Song et al. 2023; Geng et al. 2024): f at t is what it is earlier on a trajectory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from diffkd.core.consistency import check_mode, check_start, earlier, pair, start_of
from diffkd.core.denoiser import Denoiser
from diffkd.core.flow import flow_time
from diffkd.core.losses import pseudo_huber, squared_error
from diffkd.core.times import TimeLaw, draw_times
from diffkd.io.config import Positive
from diffkd.methods import settings
from diffkd.methods.base import Batch, Loss, Method, Needs, Stage, Step


class Consistency(Method):
    """Consistency distillation and training, with the curriculum of easy consistency tuning (ECT)."""

    reference: ClassVar[str] = "Song et al. 2023 and Geng et al. 2024, https://arxiv.org/abs/2406.14548"
    needs: ClassVar[Needs] = Needs(
        calls="2 student, substeps of the teacher (distillation)", passes={"student": 2, "teacher": 1}
    )

    mode: Literal["distillation", "training"] = Field(
        "distillation",
        description="where x_s comes from: a step of the teacher, or the data and x_t's own noise",
    )
    teacher: settings.Teacher = "original"
    steps: list[Positive] = Field(
        [4, 2, 1], min_length=1, description="step counts that a student is saved for"
    )
    sampler: settings.Solver = "ddim"
    substeps: int = Field(1, ge=1, description="teacher steps from t to s")
    guidance: float = Field(1.0, ge=0, description="guidance weight baked in; 1 is unguided")
    doublings: int = Field(
        8, ge=1, description="parts of the stage; t - s starts at about t / 2, and each part halves it"
    )
    closest: float = Field(0.999, gt=0, lt=1, description="bound of s / t, in flow time")
    times: TimeLaw = Field(
        "log_normal", description="law of t: uniform, or log(sigma / alpha) normal with this mean and std"
    )
    mean: float = Field(-1.1, description="of log(sigma / alpha)")
    std: float = Field(2.0, gt=0, description="of log(sigma / alpha)")
    huber: float = Field(
        0.00054,
        ge=0,
        description="c / sqrt(d) of the pseudo-Huber distance, d numbers an image; 0 is the norm",
    )
    updates: int = Field(2000, ge=1, description="updates in all")
    learning_rate: float = Field(3e-4, gt=0, description="after the warm-up; falls linearly to zero")
    warmup: int = Field(20, ge=0, description="updates over which the learning rate rises")

    @model_validator(mode="after")
    def _guided_by_a_teacher(self) -> Consistency:
        check_mode(self.mode, self.guidance, self.teacher, self.sampler, self.substeps)
        return self

    def learns_what_data_is(self) -> bool:
        return self.mode == "training"

    def stages(self, start: Denoiser) -> list[Stage]:
        check_start(start, self.steps, self.guidance)
        return [
            Stage.for_steps(
                self.steps, self.updates, self.learning_rate, self.warmup, substeps=self.substeps,
                sampler=self.sampler if self.mode == "distillation" else None, guidance=self.guidance,
                drawn="renoise", teacher=self.teacher, every_time=self.mode == "distillation",
            )
        ]  # fmt: skip

    def gap(self, progress: float) -> float:
        """The share of t that s is before it: 1/2, 1/4, ... over the stage."""
        return max(2.0 ** -(1 + math.floor(progress * self.doublings)), 1 - self.closest)

    def losses(
        self, nets: Mapping[str, Any], batch: Batch, step: Step, rng: torch.Generator
    ) -> Iterator[Loss]:
        student, x0, cond = nets["student"], batch.x0, dict(batch.cond)
        schedule = student.schedule
        # 1. a time t, and s before it, nearer and nearer as training goes on
        t = draw_times(self.times, schedule, len(x0), self.mean, self.std, rng, x0.device)
        s = earlier(schedule, t, self.gap(step.progress))
        # 2. noised data, and x_s on the same trajectory: by the teacher, or with the same noise
        teacher = nets["teacher"] if self.mode == "distillation" else None
        x_t, x_s = pair(
            schedule, x0, t, s, rng, teacher, self.sampler, self.substeps, guidance=self.guidance, **cond
        )
        # 3. what the student itself makes of x_s, without gradients
        with torch.no_grad():
            target = start_of(student, x_s, s, t, **cond)
        # 4. L = d(f(x_t, t), target) / (t - s)
        denoised = student(x_t, t, **cond)
        distance = pseudo_huber(denoised, target, self.huber * math.sqrt(x0[0].numel()))
        loss = distance / (flow_time(schedule, t) - flow_time(schedule, s)).to(distance.dtype)
        gap = squared_error(denoised.detach(), target).sqrt()
        yield Loss("student", loss.mean(), {"t": t, "loss": loss.detach(), "gap": gap})
