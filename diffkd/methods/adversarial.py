"""Adversarial distillation (ADD, LADD; Sauer et al. 2023 and 2024): heads on the teacher's features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffkd.core.denoiser import Denoiser
from diffkd.core.discriminator import (
    Heads,
    accuracy,
    block_shapes,
    finite_r1,
    hinge,
    minus_logit,
    nudged,
    seen,
)
from diffkd.core.losses import squared_error
from diffkd.core.noise import add_noise
from diffkd.core.scores import check_drawn, check_start, draw
from diffkd.core.times import draw_times
from diffkd.io.config import Beta
from diffkd.methods import settings
from diffkd.methods.base import Batch, Loss, Method, Needs, Optimization, Stage, Step


class Adversarial(Method):
    """Adversarial distillation: heads on the teacher's blocks tell the student's images from the data.

    Both are noised first. With a weight on `distance` the student keeps to its teacher's predictions (ADD).
    """

    reference: ClassVar[str] = "Sauer et al. 2024, https://arxiv.org/abs/2403.12015"
    hooks: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs(
        real=True,
        networks=("heads",),
        memory="little for heads; the teacher's activations",
        in_short="activations",
        calls="1 student, 1 teacher with gradients; then critic_updates times 2 teacher (3 with r1), all but "
        "the first with 1 student more",
        passes={"student": 1, "teacher": 3},
    )

    steps: int = Field(1, ge=1, description="sampling steps of the student")
    drawn: settings.Drawn = "renoise"
    teacher: settings.Seen = "original"
    updates: int = Field(500, ge=1, description="updates of the student")
    learning_rate: float = Field(1e-4, gt=0, description="the student's; falls linearly to zero")
    warmup: int = Field(20, ge=0, description="updates over which the learning rates rise")
    critic_updates: int = Field(1, ge=1, description="updates of the heads for one of the student")
    critic_learning_rate: float | None = Field(None, gt=0, description="of the heads; default the student's")
    betas: tuple[Beta, Beta] | None = Field(
        (0.0, 0.99), description="of AdamW, the student's and the heads'; null is what training says"
    )
    blocks: list[str] | None = Field(
        None, min_length=1, description="the teacher's modules with a head; default all that see the image"
    )
    noise_mean: float = Field(
        1.0,
        description="of log(sigma / alpha) at which images are told apart; higher is more noise",
    )
    noise_std: float = Field(1.0, ge=0, description="its standard deviation")
    r1: settings.R1 = 0.0
    r1_noise: settings.R1Noise = 0.1
    distance: float = Field(
        0.0,
        ge=0,
        description="weight of the distance to the teacher's prediction, a mean over values; LADD: 0",
    )
    guidance: float = Field(1.0, ge=0, description="guidance weight of that prediction; 1 is unguided")
    simulate: settings.Simulate = True

    @model_validator(mode="after")
    def _fits_together(self) -> Adversarial:
        check_drawn(self.drawn, self.simulate)
        if self.guidance != 1.0 and self.distance == 0:
            raise ValueError(
                f"guidance {self.guidance:g} is of the teacher's prediction, which distance: 0 does not ask; "
                "leave it out, or give distance a weight"
            )
        return self

    def stages(self, start: Denoiser) -> list[Stage]:
        check_start(start, self.steps, self.guidance, self.drawn)
        networks = {
            "student": Optimization(betas=self.betas),
            "heads": Optimization(self.critic_learning_rate or self.learning_rate, self.betas),
        }
        return [
            Stage(
                f"{self.steps}-steps", self.updates, self.learning_rate, self.warmup, self.steps,
                guidance=self.guidance, drawn=self.drawn, networks=networks,
                teacher=self.teacher, every_time=True,
            )
        ]  # fmt: skip

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        """The discriminator's heads on the teacher's blocks."""
        return {"heads": Heads(block_shapes(teacher, self.blocks)).to(student.device)}

    def losses(
        self, nets: Mapping[str, Any], batch: Batch, step: Step, rng: torch.Generator
    ) -> Iterator[Loss]:
        student, teacher, heads = nets["student"], nets["teacher"], nets["heads"]
        schedule, x0 = student.schedule, batch.x0
        cond: dict[str, Any] = dict(batch.cond)

        def images() -> Tensor:
            return draw(student, x0, self.steps, rng, drawn=self.drawn, simulated=self.simulate, **cond)

        def noised(x: Tensor) -> tuple[Tensor, Tensor]:
            law = (self.noise_mean, self.noise_std)
            t = draw_times("log_normal", schedule, len(x), *law, rng, x.device)
            return add_noise(schedule, x, t, rng), t

        # 1. the student's images, noised, as the teacher's blocks see them
        x = images()
        x_t, t = noised(x)
        guidance = step.stage.guidance if self.distance else 1.0
        denoised, features = seen(teacher, heads, x_t, t, guidance=guidance, **cond)
        # 2. images that the heads take for real, and whose noised versions the teacher restores
        loss = minus_logit(heads(features))
        gap = squared_error(x, denoised)
        if self.distance:
            loss = loss + self.distance * schedule.at(t)[0].to(gap.dtype) * gap
        yield Loss("student", loss.mean(), {"t": t, "loss": loss.detach(), "gap": gap.detach().sqrt()})
        for k in range(self.critic_updates):
            # 3. the heads learn to tell them from the data, each with a noise of its own
            with torch.no_grad():
                x = images() if k else x.detach()
                _, drawn = seen(teacher, heads, *noised(x), **cond)
                x_t, t = noised(x0)
                _, real = seen(teacher, heads, x_t, t, **cond)
            logits, told = heads(real), heads(drawn)
            loss = hinge(logits, told)
            # 4. and are to change little where the data does
            if self.r1:
                with torch.no_grad():
                    moved_t = nudged(schedule, x_t, t, self.r1_noise, rng)
                    _, moved = seen(teacher, heads, moved_t, t, **cond)
                loss = loss + self.r1 * finite_r1(logits, heads(moved))
            metrics = {"t": t, "loss": loss.detach(), "accuracy": accuracy(logits, told)}
            yield Loss("heads", loss.mean(), metrics)
