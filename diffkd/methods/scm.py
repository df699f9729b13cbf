"""sCM (Lu & Song 2024): continuous-time consistency: the derivative of f along a trajectory goes to zero."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffkd.core.consistency import check_mode, check_start, tangent
from diffkd.core.denoiser import Denoiser
from diffkd.core.derivative import Derivative
from diffkd.core.losses import squared_error
from diffkd.core.times import TimeLaw, draw_times
from diffkd.errors import UserError
from diffkd.io.config import Positive
from diffkd.io.prefetch import to_device
from diffkd.methods import settings
from diffkd.methods.base import Batch, Loss, Method, Needs, Stage, Step

WAVES = 8


class TimeWeight(nn.Module):
    """w(t), a logarithm of the loss's weight: (B,) -> (B,) float32, 0 for every t until it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(2 * WAVES, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, t: Tensor) -> Tensor:
        angles = t.double()[:, None] * math.pi * torch.arange(1, WAVES + 1, device=t.device)
        waves = torch.cat([angles.sin(), angles.cos()], 1).to(self.last.weight.dtype)
        value: Tensor = self.last(waves)[:, 0].clone()  # no view: FSDP2 hooks onto the output
        return value


class SCM(Method):
    """Simplified continuous-time consistency models (sCM), by distillation or training."""

    reference: ClassVar[str] = "Lu & Song 2024, https://arxiv.org/abs/2410.11081"
    needs: ClassVar[Needs] = Needs(
        networks=("weight",),
        memory="little for weight; with jvp its attention, which grows with the square of the tokens",
        in_short="little, (attention)",
        calls="1 student, 1 derivative of it (about 2), 1 teacher (distillation)",
        passes={"student": 3, "teacher": 1},
    )

    mode: Literal["distillation", "training"] = Field(
        "distillation",
        description="whose velocity the tangent follows: the teacher's, or that of each noised image",
    )
    teacher: settings.Teacher = "original"
    steps: list[Positive] = Field(
        [4, 2, 1], min_length=1, description="step counts that a student is saved for"
    )
    guidance: float = Field(1.0, ge=0, description="guidance weight baked in; 1 is unguided")
    times: TimeLaw = Field(
        "log_normal", description="law of t: uniform, or log(sigma / alpha) normal with this mean and std"
    )
    mean: float = Field(-1.0, description="of log(sigma / alpha)")
    std: float = Field(1.4, gt=0, description="of log(sigma / alpha)")
    tangent_warmup: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of the stage over which the derivative's part of the tangent rises",
    )
    c: float = Field(0.1, gt=0, description="added to a tangent's root mean square, which it is divided by")
    derivative: Derivative = Field(
        "difference", description="of the student: exact by jvp, or a difference, which is smoother in time"
    )
    step: float = Field(0.02, gt=0, lt=0.5, description="half the span of a difference, in t")
    weighting: Literal["adaptive", "fixed"] = Field(
        "adaptive", description="weight of each time: learned by a network of its own, or the same"
    )
    updates: int = Field(2000, ge=1, description="updates in all")
    learning_rate: float = Field(3e-4, gt=0, description="after the warm-up; falls linearly to zero")
    warmup: int = Field(20, ge=0, description="updates over which the learning rate rises")

    @model_validator(mode="after")
    def _guided_by_a_teacher(self) -> SCM:
        check_mode(self.mode, self.guidance, self.teacher)
        return self

    def learns_what_data_is(self) -> bool:
        return self.mode == "training"

    def stages(self, start: Denoiser) -> list[Stage]:
        if not start.schedule.variance_preserving:
            raise UserError(
                "scm's angle is of a schedule that preserves variance (alpha² + sigma² = 1), which this "
                "teacher's does not; use consistency, or a teacher of betas"
            )
        check_start(start, self.steps, self.guidance)
        return [
            Stage.for_steps(
                self.steps, self.updates, self.learning_rate, self.warmup,
                guidance=self.guidance, drawn="renoise", teacher=self.teacher,
                every_time=self.mode == "distillation",
            )
        ]  # fmt: skip

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        return {"weight": TimeWeight().to(student.device)} if self.weighting == "adaptive" else {}

    def losses(
        self, nets: Mapping[str, Any], batch: Batch, step: Step, rng: torch.Generator
    ) -> Iterator[Loss]:
        student, x0, cond = nets["student"], batch.x0, dict(batch.cond)
        # 1. x_t = cos(a) x0 + sin(a) eps: TrigFlow's angle, of data in the units of the noise
        t = draw_times(self.times, student.schedule, len(x0), self.mean, self.std, rng, x0.device)
        eps = to_device(torch.randn(x0.shape, generator=rng), x0.device)
        cos, sin = student.schedule.at(t, like=x0)
        x_t = cos * x0 + sin * eps
        # 2. dx_t / da, the teacher's velocity or that of this pair
        velocity = cos * eps - sin * x0
        if self.mode == "distillation":
            with torch.no_grad():
                x0_t, eps_t = nets["teacher"].predict(x_t, t, guidance=step.stage.guidance, **cond)
                velocity = cos * eps_t - sin * x0_t
        # 3. the student's F = v, and the tangent, normalised
        x0_t, eps_t = student.predict(x_t, t, **cond)
        output = cos * eps_t - sin * x0_t
        share = min(1.0, step.progress / self.tangent_warmup) if self.tangent_warmup else 1.0
        g = tangent(student, x_t, t, output.detach(), velocity, share, self.derivative, self.step, **cond)
        size = g.square().flatten(1).mean(1).sqrt()
        g = g / (size + self.c).reshape(-1, *[1] * (g.ndim - 1))
        # 4. L = e^w |F - sg(F) - g|^2 / d - w
        error = squared_error(output, output.detach() + g)
        w = nets["weight"](t) if "weight" in nets else torch.zeros_like(error)
        loss = w.detach().exp() * error
        yield Loss("student", loss.mean(), {"t": t, "loss": loss.detach(), "tangent": size})
        # 5. the same, for w
        if "weight" in nets:
            yield Loss("weight", (w.exp() * error.detach() - w).mean())
