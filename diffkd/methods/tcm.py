"""TCM (Lee et al. 2024): consistency of the noisy times alone, a second stage whose boundary is the first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from diffkd.core.consistency import check_mode, check_start, earlier, pair, starts_of
from diffkd.core.denoiser import Denoiser
from diffkd.core.flow import flow_time
from diffkd.core.losses import pseudo_huber, squared_error
from diffkd.core.times import times_above
from diffkd.errors import UserError
from diffkd.io.config import Positive
from diffkd.io.prefetch import to_device
from diffkd.methods import settings
from diffkd.methods.base import Batch, Loss, Method, Needs, Stage, Step
from diffkd.models.students.copies import copy_of


class TCM(Method):
    """Consistency above a noise level, below which the student of the stage before it stays."""

    reference: ClassVar[str] = "Lee et al. 2024, https://arxiv.org/abs/2410.14895"
    needs: ClassVar[Needs] = Needs(
        real=True,
        after="consistency",
        networks=("first with distillation",),
        memory="weights of first, with distillation",
        in_short="(weights)",
        calls="1 student, 1 of it or of the first-stage student, by where x_s is; substeps of the teacher "
        "(distillation)",
        passes={"student": 1.75, "teacher": 0.25},
    )

    mode: Literal["distillation", "training"] = Field(
        "training",
        description="where x_s comes from: a step of the run's teacher, or the data and x_t's own noise",
    )
    sampler: settings.Solver = "ddim"
    substeps: int = Field(1, ge=1, description="teacher steps from t to s")
    guidance: float = Field(1.0, ge=0, description="guidance weight of the teacher's step; 1 is unguided")
    steps: list[Positive] = Field([2, 1], min_length=1, description="step counts that a student is saved for")
    truncation: float = Field(
        1.0, gt=0, description="sigma / alpha below which the first stage's student is the boundary"
    )
    boundary: float = Field(0.25, gt=0, lt=1, description="share of the examples with t at the boundary")
    boundary_weight: float = Field(0.1, ge=0, description="of their loss")
    scale: float = Field(
        1.0, gt=0, description="median of log(sigma / alpha) above the boundary, of the other examples"
    )
    closest: float = Field(0.99, gt=0, lt=1, description="s / t, in flow time; less where the noise is low")
    huber: float = Field(
        0.00054,
        ge=0,
        description="c / sqrt(d) of the pseudo-Huber distance, d numbers an image; 0 is the norm",
    )
    updates: int = Field(1000, ge=1, description="updates in all")
    learning_rate: float = Field(1e-4, gt=0, description="after the warm-up; falls linearly to zero")
    warmup: int = Field(20, ge=0, description="updates over which the learning rate rises")

    @model_validator(mode="after")
    def _guided_by_a_teacher(self) -> TCM:
        check_mode(self.mode, self.guidance, sampler=self.sampler, substeps=self.substeps)
        return self

    def learns_what_data_is(self) -> bool:
        return self.mode == "training"

    def stages(self, start: Denoiser) -> list[Stage]:
        if start.steps is None or start.sampler != "renoise":
            raise UserError(
                "tcm is the second stage of a consistency model, and what it starts from is none; put "
                "consistency, scm or lcm before it"
            )
        check_start(start, self.steps, self.guidance)
        for steps in self.steps:
            alpha, sigma = start.schedule.numbers(1 / steps)
            if sigma < self.truncation * alpha:
                raise UserError(
                    f"a student of {steps} steps is asked at sigma / alpha = {sigma / alpha:.3g}, below "
                    f"method.truncation {self.truncation:g}, where it does not learn; use fewer steps, or a "
                    "lower truncation"
                )
        return [
            Stage.for_steps(
                self.steps, self.updates, self.learning_rate, self.warmup, substeps=self.substeps,
                sampler=self.sampler if self.mode == "distillation" else None, guidance=self.guidance,
                drawn="renoise", teacher="original" if self.mode == "distillation" else "previous",
                every_time=self.mode == "distillation",
            )
        ]  # fmt: skip

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        """The student as it begins, where the stage's teacher is another."""
        return {"first": copy_of(student).requires_grad_(False)} if self.mode == "distillation" else {}

    def losses(
        self, nets: Mapping[str, Any], batch: Batch, step: Step, rng: torch.Generator
    ) -> Iterator[Loss]:
        student, first = nets["student"], nets.get("first", nets["teacher"])
        x0, cond = batch.x0, dict(batch.cond)
        schedule = student.schedule
        # 1. t above t', or for some examples t' itself; s a little before it
        t = times_above(schedule, len(x0), self.truncation, self.scale, rng, torch.device("cpu"))
        least = schedule.time_of(torch.full_like(t, -math.log(self.truncation)))
        at_boundary = torch.rand(len(x0), generator=rng) < self.boundary
        t = torch.where(at_boundary, least, t)
        s = earlier(schedule, t, 1 - self.closest)
        above, below = s >= least, (s > 0) & (s < least)  # at 0 the trajectory begins: none is asked
        t, s, at_boundary = (to_device(values, x0.device) for values in (t, s, at_boundary))
        # 2. noised data, and x_s on the same trajectory: by the teacher, or with the same noise
        teacher = nets["teacher"] if self.mode == "distillation" else None
        x_t, x_s = pair(
            schedule, x0, t, s, rng, teacher, self.sampler, self.substeps, guidance=self.guidance, **cond
        )
        # 3. the target, without gradients: the student's own above t', the first stage's below
        with torch.no_grad():
            own = starts_of(student, above, x_s, s, t, **cond)
            before = starts_of(first, below, x_s, s, t, **cond)
            chosen = to_device(above, x0.device).reshape(-1, *[1] * (x0.ndim - 1))
            target = torch.where(chosen, own, before)
        # 4. L = w_b L_boundary + L_consistency, each a mean over its own examples
        denoised = student(x_t, t, **cond)
        distance = pseudo_huber(denoised, target, self.huber * math.sqrt(x0[0].numel()))
        loss = distance / (flow_time(schedule, t) - flow_time(schedule, s)).to(distance.dtype)
        share = torch.where(at_boundary, self.boundary_weight / self.boundary, 1 / (1 - self.boundary))
        gap = squared_error(denoised.detach(), target).sqrt()
        yield Loss("student", (share * loss).mean(), {"t": t, "loss": loss.detach(), "gap": gap})
