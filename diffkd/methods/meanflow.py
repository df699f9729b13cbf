"""MeanFlow (Geng et al. 2025): the student is the average velocity between any two times of a flow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffkd.core import flow
from diffkd.core.consistency import check_mode
from diffkd.core.denoiser import Denoiser, Predicted
from diffkd.core.derivative import Derivative
from diffkd.core.losses import squared_error
from diffkd.core.noise import steps_of_grids
from diffkd.core.times import draw_times
from diffkd.io.config import Positive
from diffkd.io.prefetch import to_device
from diffkd.methods import settings
from diffkd.methods.base import Batch, Loss, Method, Needs, Stage, Step

SMALL = 1e-3  # mean squared error below which the adaptive weight is constant
Law = tuple[float, Annotated[float, Field(gt=0)]]


class MeanFlow(Method):
    """One network for every step count: it learns the average velocity over steps of any length."""

    reference: ClassVar[str] = "Geng et al. 2025, https://arxiv.org/abs/2505.13447"
    needs: ClassVar[Needs] = Needs(
        memory="with jvp its attention, which grows with the square of the tokens",
        in_short="(attention)",
        calls="1 student, 1 derivative of it (about 2) for three quarters of the batch, 1 teacher "
        "(distillation)",
        passes={"student": 2.5, "teacher": 1},
    )

    mode: Literal["distillation", "training"] = Field(
        "distillation",
        description="whose velocity is averaged: the teacher's, or that of each noised image",
    )
    teacher: settings.Teacher = "original"
    steps: list[Positive] = Field(
        [4, 2, 1], min_length=1, description="step counts that a student is saved for, all of one training"
    )
    guidance: float = Field(1.0, ge=0, description="guidance weight baked in; 1 is unguided")
    ratio: float = Field(
        0.75, ge=0, le=1, description="share of examples with r < t; the others learn the velocity itself"
    )
    grid: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of those that are steps of the students, of any of their step counts",
    )
    t_law: Law = Field((-0.6, 1.6), description="mean and deviation of the logit of t, in flow time")
    r_law: Law = Field((-4.0, 1.6), description="the same of r; the larger of the two is t")
    power: float = Field(
        0.75, ge=0, le=1, description="of the adaptive weight, 1 / error^power; 0 is the squared error"
    )
    derivative: Derivative = Field(
        "difference", description="of the student: exact by jvp, or a difference, which is smoother in time"
    )
    step: float = Field(0.02, gt=0, lt=0.5, description="half the span of a difference, in t")
    updates: int = Field(2000, ge=1, description="updates in all")
    learning_rate: float = Field(6e-4, gt=0, description="after the warm-up; falls linearly to zero")
    warmup: int = Field(50, ge=0, description="updates over which the learning rate rises")

    @model_validator(mode="after")
    def _guided_by_a_teacher(self) -> MeanFlow:
        check_mode(self.mode, self.guidance, self.teacher)
        return self

    def learns_what_data_is(self) -> bool:
        return self.mode == "training"

    def stages(self, start: Denoiser) -> list[Stage]:
        flow.check_start(start, self.steps, self.guidance)
        return [
            Stage.for_steps(
                self.steps, self.updates, self.learning_rate, self.warmup,
                guidance=self.guidance, teacher=self.teacher, interval=True,
                every_time=self.mode == "distillation",
            )
        ]  # fmt: skip

    def losses(
        self, nets: Mapping[str, Any], batch: Batch, step: Step, rng: torch.Generator
    ) -> Iterator[Loss]:
        student, x0, cond = nets["student"], batch.x0, batch.cond
        # 1. times r <= t, with r < t for the first k examples
        t, r, k = self._times(student, len(x0), rng, x0.device)
        # 2. the noised data, and the velocity there
        eps = to_device(torch.randn(x0.shape, generator=rng), x0.device)
        alpha, sigma = student.schedule.at(t, like=x0)
        x_t, predicted = alpha * x0 + sigma * eps, Predicted(x0, eps)
        if self.mode == "distillation":
            with torch.no_grad():
                predicted = nets["teacher"].predict(x_t, t, guidance=step.stage.guidance, **cond)
        # 3. the student's average velocity
        u = flow.velocity(student.predict(x_t, t, interval=t - r, **cond))
        # 4. its target: the velocity, or by the identity
        u_target = flow.velocity(predicted)
        if k:
            first = {key: value[:k] for key, value in cond.items()}
            part = Predicted(predicted.x0[:k], predicted.eps[:k])
            averaged = flow.average_velocity(
                student, x_t[:k], t[:k], r[:k], part, self.derivative, self.step, **first
            )
            u_target = torch.cat([averaged, u_target[k:]])
        # 5. the squared error, less of it where it is large
        error = squared_error(u, u_target)
        loss = error / (error.detach() + SMALL) ** self.power
        yield Loss("student", loss.mean(), {"t": t, "loss": loss.detach(), "gap": error.detach().sqrt()})

    def _times(
        self, student: Denoiser, count: int, rng: torch.Generator, device: torch.device
    ) -> tuple[Tensor, Tensor, int]:
        """t and r of each example, and for how many, the first ones, r < t: in the mean, `ratio` of them."""
        k = int(self.ratio * count + torch.rand((), generator=rng, dtype=torch.float64).item())
        drawn = [
            draw_times("log_normal", student.schedule, count, *law, rng, device)
            for law in (self.t_law, self.r_law)
        ]
        t, r = torch.maximum(*drawn), torch.minimum(*drawn)
        on_grid = to_device(torch.rand(count, generator=rng) < self.grid, device)
        stepped = steps_of_grids(count, self.steps, rng, device)
        t, r = torch.where(on_grid, stepped[0], t), torch.where(on_grid, stepped[1], r)
        return t, torch.cat([torch.minimum(r, t)[:k], t[k:]]), k
