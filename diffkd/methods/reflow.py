"""Reflow (Liu et al. 2022): the student learns straight lines from noises to the images made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffkd.core import flow
from diffkd.core.denoiser import Denoiser
from diffkd.core.losses import squared_error
from diffkd.core.noise import grid_times
from diffkd.core.samplers import SamplerName
from diffkd.core.schedules import Schedule
from diffkd.io.config import Positive
from diffkd.io.prefetch import to_device
from diffkd.methods.base import Batch, Loss, Method, Needs, Pairs, Stage, Step


def line(schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The state at t of the straight line from an image to the noise that it was made of, and eps there.

    x0, noise: (B, C, H, W); t: (B,). Straight in the flow's coordinates (`core.flow`), in which it is Liu et
    al. 2022, algorithm 1: x_t = alpha x0 + sigma eps, with the one eps for which x_1 is the noise. At zero
    terminal SNR that is the noise itself; else x_1 holds a little of the image.
    """
    alpha, sigma = schedule.at(t, like=x0)
    alpha_1, sigma_1 = schedule.at(torch.ones_like(t), like=x0)
    eps = (schedule.from_noise(noise) - alpha_1 * x0) / sigma_1
    return alpha * x0 + sigma * eps, eps


class Reflow(Method):
    """The teacher's flow made straight, then its one step, or few, from pairs of its own."""

    reference: ClassVar[str] = "Liu et al. 2022, https://arxiv.org/abs/2209.03003"
    needs: ClassVar[Needs] = Needs(data=False, pairs=True, calls="1 student", passes={"student": 1})

    steps: list[Positive] = Field(
        [8, 4, 2, 1],
        min_length=1,
        description="step counts of the students: the last is distilled, the others are the straight flow",
    )
    pairs: Positive = Field(50_000, description="noises that the teacher makes images of, to learn from")
    pair_steps: Positive = Field(64, description="the teacher's steps for these images")
    sampler: SamplerName = Field("ddim", description="of the teacher: ddim, heun or dpmpp_2m")
    teacher: str = Field(
        "original", description="whose flow: the run's teacher's, or previous, or a student's"
    )
    guidance: float = Field(1.0, ge=0, description="guidance weight of these images; 1 is unguided")
    updates: int = Field(2000, ge=1, description="updates in which the flow is made straight")
    distilling: int = Field(1000, ge=1, description="updates of the last student")
    learning_rate: float = Field(5e-4, gt=0, description="at a stage's start, falls linearly to zero over it")
    warmup: int = Field(20, ge=0, description="updates of a stage over which the learning rate rises")

    @model_validator(mode="after")
    def _steps_decrease(self) -> Reflow:
        if any(after >= before for before, after in zip(self.steps[:-1], self.steps[1:], strict=True)):
            raise ValueError(f"steps {self.steps} do not decrease; list the largest first")
        return self

    def stages(self, start: Denoiser) -> list[Stage]:
        """The straight flow, drawn in all step counts but the last; from its pairs at the most of these, the
        last. A single step count is of the flow itself.

        An epsilon network becomes what the schedule has for that, such as v-prediction: near noise its
        velocity is its error enlarged.
        """
        for count in self.steps:
            start.schedule.check_steps(count)
        if self.guidance != 1.0:
            start.check_guidance()
        most, *others = self.steps
        stages = [
            Stage(
                f"{most}-steps", self.updates, self.learning_rate, self.warmup, most, guidance=self.guidance,
                prediction=start.schedule.bounded if start.prediction == "epsilon" else None,
                teacher=self.teacher,
                also=tuple(others[:-1]), pairs=Pairs(self.pairs, self.pair_steps, self.sampler),
            )
        ]  # fmt: skip
        if others:
            last = others[-1]
            stages.append(
                Stage(
                    f"{last}-steps", self.distilling, self.learning_rate, self.warmup, last,
                    pairs=Pairs(self.pairs, most),
                )
            )  # fmt: skip
        return stages

    def losses(
        self, nets: Mapping[str, Any], batch: Batch, step: Step, rng: torch.Generator
    ) -> Iterator[Loss]:
        student, x0, noise, schedule = nets["student"], batch.x0, batch.noise, nets["student"].schedule
        assert noise is not None and step.stage.steps is not None
        # 1. a time: of the whole flow, uniform in its own time; of the last student, one of its grid
        if step.stage.steps == self.steps[0]:
            t = self._flow_times(schedule, len(x0), rng, x0.device)
        else:
            t, _ = grid_times(len(x0), step.stage.steps, rng, x0.device)
        # 2. the point of the straight line from image to noise
        x_t, eps = line(schedule, x0, noise, t)
        # 3. the student's velocity there, and the line's
        predicted = student.predict(x_t, t, **batch.cond)
        loss = squared_error(flow.velocity(predicted), eps - x0)
        gap = squared_error(predicted.x0.detach(), x0).sqrt()
        yield Loss("student", loss.mean(), {"t": t, "loss": loss.detach(), "gap": gap})

    def _flow_times(
        self, schedule: Schedule, count: int, rng: torch.Generator, device: torch.device
    ) -> Tensor:
        """Uniform in the flow's time, from pure noise to the first node of the schedule's table."""
        ends = torch.tensor([1 / schedule.num_train_timesteps, 1.0], dtype=torch.float64)
        first, last = flow.flow_time(schedule, ends)
        share = torch.rand(count, generator=rng, dtype=torch.float64)
        return flow.time_at(schedule, to_device(last - share * (last - first), device))
