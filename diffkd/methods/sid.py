"""SiD (Zhou et al. 2024): score identity distillation: gradients through both scores, and no data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffkd.core.denoiser import Denoiser
from diffkd.core.fake import fake_losses
from diffkd.core.losses import squared_error
from diffkd.core.noise import add_noise
from diffkd.core.scores import check_start, draw, error_size, noise_times, score_identity
from diffkd.methods import settings
from diffkd.methods.base import Batch, Loss, Method, Needs, Optimization, Stage, Step
from diffkd.models.students.copies import copy_of


class SiD(Method):
    """Score identity distillation: the Fisher divergence between noised images, made smaller without data.

    The student's gradient passes through the teacher and through the fake network, which learns its images.
    """

    reference: ClassVar[str] = "Zhou et al. 2024, https://arxiv.org/abs/2404.04057"
    needs: ClassVar[Needs] = Needs(
        data=False,
        networks=("fake",),
        memory="a student's for fake; the activations of teacher and fake",
        in_short="a student's, activations",
        calls="1 student, 1 teacher and 1 fake, all with gradients; then fake_updates times 1 fake, all but "
        "the first with 1 student more",
        passes={"student": 1, "teacher": 1, "fake": 2},
    )

    alpha: float = Field(
        1.2,
        ge=-0.25,
        le=1.5,
        description="1/2 is the Fisher divergence's own gradient; the paper's are 1 and 1.2",
    )
    steps: int = Field(1, ge=1, description="sampling steps of the student")
    drawn: settings.Drawn = "renoise"
    guidance: float = Field(1.0, ge=0, description="guidance weight of the teacher; 1 is unguided")
    teacher: settings.Matched = "original"
    updates: int = Field(500, ge=1, description="updates of the student")
    learning_rate: float = Field(2e-4, gt=0, description="the student's; falls linearly to zero")
    warmup: int = Field(20, ge=0, description="updates over which the learning rates rise")
    fake_updates: int = Field(1, ge=1, description="updates of the fake network for one of the student")
    fake_learning_rate: settings.FakeRate = None
    t_min: float = Field(0.02, gt=0, le=1, description="least noise at which the two are compared")
    t_max: float = Field(0.97, gt=0, le=1, description="most noise at which they are compared")

    @model_validator(mode="after")
    def _has_times(self) -> SiD:
        if self.t_min > self.t_max:
            raise ValueError(f"t_min {self.t_min} is above t_max {self.t_max}; exchange them")
        return self

    def stages(self, start: Denoiser) -> list[Stage]:
        check_start(start, self.steps, self.guidance, self.drawn)
        fake = Optimization(self.fake_learning_rate or self.learning_rate)
        return [
            Stage(
                f"{self.steps}-steps", self.updates, self.learning_rate, self.warmup, self.steps,
                guidance=self.guidance, drawn=self.drawn, networks={"fake": fake},
                teacher=self.teacher, every_time=True,
            )
        ]  # fmt: skip

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        """The fake network, which begins as the teacher."""
        return {"fake": copy_of(teacher).requires_grad_(True)}

    def losses(
        self, nets: Mapping[str, Any], batch: Batch, step: Step, rng: torch.Generator
    ) -> Iterator[Loss]:
        student, teacher, fake = nets["student"], nets["teacher"], nets["fake"]
        schedule = student.schedule
        cond: dict[str, Any] = dict(batch.cond)

        def images() -> Tensor:
            return draw(student, batch.x0, self.steps, rng, drawn=self.drawn, **cond)

        # 1. the student's images, noised
        x = images()
        t = noise_times(len(x), schedule, self.t_min, self.t_max, rng, x.device)
        x_t = add_noise(schedule, x, t, rng)
        # 2. predicted by the teacher and by the fake network, both differentiated in x_t
        real = teacher(x_t, t, guidance=step.stage.guidance, **cond)
        drawn = fake(x_t, t, **cond)
        # 3. (1 - alpha) |delta|² + delta (fake - x), delta = real - fake
        loss = score_identity(x, real, drawn, self.alpha, error_size(x, real))
        gap = squared_error(drawn, real).sqrt()
        yield Loss("student", loss.mean(), {"t": t, "loss": loss.detach(), "gap": gap.detach()})
        # 4. the fake network learns the student's images at every noise level
        for learned in fake_losses(fake, None, x, images, batch.x0, self.fake_updates, rng, **cond):
            yield Loss(*learned)
