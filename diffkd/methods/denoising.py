"""Denoising on data: how a teacher is trained (Ho et al. 2020, with the weight of any prediction type)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from diffkd.core.conditioning import dropped
from diffkd.core.denoiser import Denoiser
from diffkd.core.losses import Weighting, squared_error, weight_at
from diffkd.core.noise import add_noise, grid_times
from diffkd.core.times import TimeLaw, draw_times, on_grid
from diffkd.methods.base import Batch, Loss, Method, Needs, Stage, Step


class Denoising(Method):
    """The denoising loss on data; trains a teacher from scratch, or continues one."""

    reference: ClassVar[str] = "Ho et al. 2020, https://arxiv.org/abs/2006.11239"
    needs: ClassVar[Needs] = Needs(real=True, calls="1 student, no teacher", passes={"student": 1})

    updates: int = Field(1500, ge=1, description="updates in all")
    learning_rate: float = Field(1e-3, gt=0, description="after the warm-up; falls linearly to zero")
    warmup: int = Field(50, ge=0, description="updates over which the learning rate rises")
    weight: Weighting = Field(
        "snr_plus_one",
        description="of the squared error in x0; snr_plus_one is v's, snr eps's, flow a flow's, edm EDM's",
    )
    gamma: float = Field(5.0, gt=0, description="bound of the min_snr weight")
    times: TimeLaw = Field(
        "uniform", description="law of t: uniform, or log(sigma / alpha) normal with this mean and std"
    )
    mean: float = Field(0.0, description="of log(sigma / alpha)")
    std: float = Field(1.6, gt=0, description="of log(sigma / alpha)")
    label_dropout: float = Field(
        0.1, ge=0, le=1, description="share of labels replaced by the null label, for guidance"
    )

    def stages(self, start: Denoiser) -> list[Stage]:
        return [Stage("denoising", self.updates, self.learning_rate, self.warmup)]

    def losses(
        self, nets: Mapping[str, Any], batch: Batch, step: Step, rng: torch.Generator
    ) -> Iterator[Loss]:
        student = nets["student"]
        x0, schedule = batch.x0, student.schedule
        # 1. a time, of the schedule's table where it has one, and the noised data
        steps = schedule.num_train_timesteps
        if self.times == "uniform":
            t, _ = grid_times(len(x0), steps, rng, x0.device)
        else:
            t = draw_times(self.times, schedule, len(x0), self.mean, self.std, rng, x0.device)
            t = on_grid(t, steps) if schedule.tabled else t
        x_t = add_noise(schedule, x0, t, rng)
        # 2. some labels dropped
        cond = dropped(batch.cond, student.null_of(batch.cond), self.label_dropout, rng)
        # 3. the error in x0, weighted
        error = squared_error(student(x_t, t, **cond), x0)
        loss = weight_at(self.weight, schedule, t, gamma=self.gamma) * error
        yield Loss("student", loss.mean(), {"t": t, "loss": loss.detach(), "gap": error.detach().sqrt()})
