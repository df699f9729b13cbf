"""Output matching (Hinton et al. 2015): a smaller student learns its teacher's outputs, at its step count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from diffkd.core.conditioning import dropped
from diffkd.core.denoiser import Denoiser
from diffkd.core.losses import Weighting, squared_error, weight_at
from diffkd.core.noise import add_noise, grid_times
from diffkd.methods.base import Batch, Loss, Method, Needs, Stage, Step


class Output(Method):
    """Output matching alone: knowledge distillation of a denoiser as a regression onto its teacher."""

    reference: ClassVar[str] = "Hinton, Vinyals & Dean 2015, https://arxiv.org/abs/1503.02531"
    needs: ClassVar[Needs] = Needs(calls="1 student, 1 teacher", passes={"student": 1, "teacher": 1})

    updates: int = Field(2000, ge=1, description="updates in all")
    learning_rate: float = Field(1e-3, gt=0, description="after the warm-up; falls linearly to zero")
    warmup: int = Field(50, ge=0, description="updates over which the learning rate rises")
    guidance: float = Field(1.0, ge=0, description="guidance weight baked into the student; 1 is unguided")
    prediction: Literal["v_prediction", "flow"] | None = Field(
        None, description="what the student predicts; default what it begins with"
    )
    weight: Weighting | None = Field(
        None, description="of the squared error in x0; default the error in the teacher's own output"
    )
    gamma: float = Field(5.0, gt=0, description="bound of the min_snr weight")
    label_dropout: float = Field(
        0.1, ge=0, le=1, description="share of labels replaced by the null label, for guidance"
    )

    def stages(self, start: Denoiser) -> list[Stage]:
        """One, of no steps of its own where its teacher has none, so that any method can go on from it."""
        if self.guidance != 1.0:
            start.check_guidance()
        return [
            Stage(
                "output", self.updates, self.learning_rate, self.warmup, start.steps, guidance=self.guidance,
                prediction=self.prediction, drawn=start.sampler,
            )
        ]  # fmt: skip

    def losses(
        self, nets: Mapping[str, Any], batch: Batch, step: Step, rng: torch.Generator
    ) -> Iterator[Loss]:
        student, teacher, x0 = nets["student"], nets["teacher"], batch.x0
        # 1. a time that the teacher is sampled at, the noised data, some labels dropped
        steps = step.stage.steps or student.schedule.num_train_timesteps
        t, _ = grid_times(len(x0), steps, rng, x0.device)
        x_t = add_noise(student.schedule, x0, t, rng)
        cond = dropped(batch.cond, teacher.null_of(batch.cond), self.label_dropout, rng)
        # 2. the teacher's prediction, guided
        with torch.no_grad():
            target = teacher(x_t, t, guidance=step.stage.guidance, **cond)
        # 3. the student's error, weighted: near noise an epsilon teacher is good in eps alone
        gap = squared_error(student(x_t, t, **cond), target)
        name = self.weight or teacher.weighting
        loss = weight_at(name, student.schedule, t, gamma=self.gamma) * gap
        yield Loss("student", loss.mean(), {"t": t, "loss": loss.detach(), "gap": gap.detach().sqrt()})
