"""Guidance distillation (Meng et al. 2023): the student takes the guidance weight as an input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from diffkd.core.denoiser import GUIDANCE, Denoiser
from diffkd.core.losses import Weighting, squared_error, weight_at
from diffkd.core.noise import add_noise, grid_times
from diffkd.methods import settings
from diffkd.methods.base import Batch, Loss, Method, Needs, Stage, Step


class Guidance(Method):
    """One call in place of a guided teacher's two, for every weight of a range: what comes before halving."""

    reference: ClassVar[str] = "Meng et al. 2023, https://arxiv.org/abs/2210.03142"
    needs: ClassVar[Needs] = Needs(
        labels=True, unconditional=True, calls="1 student, 2 teacher", passes={"student": 1, "teacher": 2}
    )

    range: settings.Range = Field(
        (1.0, 14.0), description="least and largest weight that the student learns to take"
    )
    updates: int = Field(2000, ge=1, description="updates in all")
    learning_rate: float = Field(1e-4, gt=0, description="after the warm-up; falls linearly to zero")
    warmup: int = Field(50, ge=0, description="updates over which the learning rate rises")
    weight: Weighting | None = Field(
        None, description="of the squared error in x0; default the error in the teacher's own output"
    )
    gamma: float = Field(5.0, gt=0, description="bound of the min_snr weight")

    def stages(self, start: Denoiser) -> list[Stage]:
        """One, of no steps of its own, so that any method can go on from it."""
        start.check_guidance()
        return [
            Stage(
                "guidance", self.updates, self.learning_rate, self.warmup, start.steps, drawn=start.sampler,
                guidance_range=self.range,
            )
        ]  # fmt: skip

    def losses(
        self, nets: Mapping[str, Any], batch: Batch, step: Step, rng: torch.Generator
    ) -> Iterator[Loss]:
        student, teacher, x0 = nets["student"], nets["teacher"], batch.x0
        # 1. a time that the teacher is sampled at, and the noised data; the batch brings w of each example
        steps = step.stage.steps or student.schedule.num_train_timesteps
        t, _ = grid_times(len(x0), steps, rng, x0.device)
        x_t = add_noise(student.schedule, x0, t, rng)
        assert GUIDANCE in batch.cond
        # 2. the teacher's prediction, guided with w
        with torch.no_grad():
            target = teacher(x_t, t, **batch.cond)
        # 3. the student's, which is told w
        gap = squared_error(student(x_t, t, **batch.cond), target)
        name = self.weight or teacher.weighting
        loss = weight_at(name, student.schedule, t, gamma=self.gamma) * gap
        yield Loss("student", loss.mean(), {"t": t, "loss": loss.detach(), "gap": gap.detach().sqrt()})
