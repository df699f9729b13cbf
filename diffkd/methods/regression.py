"""Regression (Luhman & Luhman 2021): one step learns which image the teacher makes of each noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from diffkd.core.denoiser import Denoiser
from diffkd.core.losses import pseudo_huber, squared_error
from diffkd.core.samplers import SamplerName
from diffkd.io.config import Positive
from diffkd.methods.base import Batch, Loss, Method, Needs, Pairs, Stage, Step


def distance(x: Tensor, y: Tensor, huber: float) -> Tensor:
    """Of each example, (B, ...) -> (B,), whatever the size of an image: half the mean square of differences
    below `huber`, and `huber` times their root mean square above, less a constant; 0 is half the mean square.
    """
    if huber == 0:
        return squared_error(x, y) / 2
    values = x[0].numel()
    return huber * pseudo_huber(x, y, huber * math.sqrt(values)) / math.sqrt(values)


class Regression(Method):
    """Regression onto pairs: the teacher's sampler as one step."""

    reference: ClassVar[str] = "Luhman & Luhman 2021, https://arxiv.org/abs/2101.02388"
    needs: ClassVar[Needs] = Needs(data=False, pairs=True, calls="1 student", passes={"student": 1})

    pairs: Positive = Field(50_000, description="noises that the teacher makes images of, to learn from")
    pair_steps: Positive = Field(64, description="the teacher's steps for these images")
    sampler: SamplerName = Field("ddim", description="of the teacher: ddim, heun or dpmpp_2m")
    teacher: str = Field(
        "original", description="whose images: the run's teacher's, or previous, or a student's"
    )
    guidance: float = Field(1.0, ge=0, description="guidance weight of these images; 1 is unguided")
    huber: float = Field(
        0.0, ge=0, description="pixel difference above which an error counts linearly; 0 is the squared error"
    )
    updates: int = Field(2000, ge=1, description="updates in all")
    learning_rate: float = Field(5e-4, gt=0, description="after the warm-up; falls linearly to zero")
    warmup: int = Field(20, ge=0, description="updates over which the learning rate rises")

    def stages(self, start: Denoiser) -> list[Stage]:
        """One, of one step. An epsilon network becomes what the schedule has for that, such as v-prediction:
        its x0 of pure noise is no use."""
        if self.guidance != 1.0:
            start.check_guidance()
        return [
            Stage(
                "1-steps", self.updates, self.learning_rate, self.warmup, 1, guidance=self.guidance,
                prediction=start.schedule.bounded if start.prediction == "epsilon" else None,
                teacher=self.teacher,
                pairs=Pairs(self.pairs, self.pair_steps, self.sampler),
            )
        ]  # fmt: skip

    def losses(
        self, nets: Mapping[str, Any], batch: Batch, step: Step, rng: torch.Generator
    ) -> Iterator[Loss]:
        student, x0, noise = nets["student"], batch.x0, batch.noise
        assert noise is not None
        # 1. the student's one step from pure noise is its prediction there
        t = torch.ones(len(x0), dtype=torch.float64, device=x0.device)
        denoised = student(student.schedule.from_noise(noise), t, **batch.cond)
        # 2. its distance from the teacher's image of that noise
        loss = distance(denoised, x0, self.huber)
        gap = squared_error(denoised.detach(), x0).sqrt()
        yield Loss("student", loss.mean(), {"t": t, "loss": loss.detach(), "gap": gap})
