"""Inductive moment matching (Zhou, Ermon & Song 2025): what t gives at s is distributed as what r gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffkd.core import flow, samplers
from diffkd.core.consistency import check_mode
from diffkd.core.denoiser import Denoiser
from diffkd.core.moments import discrepancy, of_one_group
from diffkd.core.noise import steps_of_grids
from diffkd.core.schedules import Schedule
from diffkd.io.config import Positive
from diffkd.io.prefetch import to_device
from diffkd.methods import settings
from diffkd.methods.base import Batch, Loss, Method, Needs, Stage, Step


def moved(student: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, **cond: Tensor) -> Tensor:
    """The student's one step from t to s <= t: (B, ...), x_t itself where s = t."""
    inside = s < t
    safe = torch.where(inside, t, 1.0)  # at t = s = 0 there is no denoiser
    denoised = student(x_t, safe, interval=safe - s, **cond)
    x_s = samplers.ddim_step(student.schedule, x_t, denoised, safe, s)
    return torch.where(inside.reshape(-1, *[1] * (x_t.ndim - 1)), x_s, x_t)


def time_weight(schedule: Schedule, t: Tensor, b: float) -> Tensor:
    """1/2 sigmoid(b - lambda) (-d lambda / dt) alpha, lambda = log(alpha² / sigma²): (B,) float64.

    Zhou, Ermon & Song 2025, equation 13, with a = 1. It is finite at alpha = 0.
    """
    alpha, sigma = schedule.at(t)
    d_alpha, d_sigma = flow.rates(schedule, t, like=alpha)
    rate = (d_sigma * alpha - d_alpha * sigma) / sigma  # -1/2 d lambda / dt alpha
    return torch.sigmoid(b - 2 * schedule.half_log_snr(t)) * rate


class IMM(Method):
    """A step of any length gives the distribution that a shorter one gives, by the moments of groups."""

    reference: ClassVar[str] = "Zhou, Ermon & Song 2025, https://arxiv.org/abs/2503.07565"
    needs: ClassVar[Needs] = Needs(
        real=True, calls="2 student, 1 teacher (distillation)", passes={"student": 2}
    )

    mode: Literal["distillation", "training"] = Field(
        "training",
        description="how x_r is made of x_t: by a step of the teacher, or of the data with its noise",
    )
    teacher: settings.Teacher = "original"
    steps: list[Positive] = Field(
        [4, 2, 1], min_length=1, description="step counts that a student is saved for, all of one training"
    )
    guidance: float = Field(1.0, ge=0, description="guidance weight baked in; 1 is unguided")
    group: int = Field(4, ge=1, description="examples that share their times, and are compared")
    gap: float = Field(1 / 16, gt=0, lt=1, description="t - r, less where s is nearer")
    grid: float = Field(
        0.0, ge=0, le=1, description="share of groups whose t and s are a step of the students' own"
    )
    scale: float = Field(
        1.0, gt=0, description="of the kernel exp(-scale |x - y| / D), distances in units of the network's v"
    )
    b: float = Field(5.0, description="of the weight: log-SNR above which times count little")
    updates: int = Field(2000, ge=1, description="updates in all")
    learning_rate: float = Field(3e-4, gt=0, description="after the warm-up; falls linearly to zero")
    warmup: int = Field(50, ge=0, description="updates over which the learning rate rises")

    @model_validator(mode="after")
    def _guided_by_a_teacher(self) -> IMM:
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
        student, schedule, device = nets["student"], nets["student"].schedule, batch.x0.device
        # 1. groups of examples, of one class as far as there are labels, with times s <= r < t of their own
        x0, cond = _sorted(batch)
        group = to_device(torch.arange(len(x0)) // self.group, device)
        t, r, s = (times[group] for times in self._times(-(-len(x0) // self.group), rng, device))
        # 2. x_t, and x_r of the same image and noise, or where the teacher's step leads
        eps = to_device(torch.randn(x0.shape, generator=rng), device)
        alpha, sigma = schedule.at(t, like=x0)
        x_t, denoised = alpha * x0 + sigma * eps, x0
        if self.mode == "distillation":
            with torch.no_grad():
                denoised = nets["teacher"](x_t, t, guidance=step.stage.guidance, **cond)
        x_r = samplers.ddim_step(schedule, x_t, denoised, t, r)
        # 3. the student's steps from both to s
        y_t = moved(student, x_t, t, s, **cond)
        with torch.no_grad():
            y_r = moved(student, x_r, r, s, **cond)
        # 4. the distance of their distributions, on the scale of what the network puts out: x_s moves by c v
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t), schedule.at(s)
        c = alpha_s * sigma_t - sigma_s * alpha_t
        loss = discrepancy(y_t, y_r, (self.scale / c).to(y_t), of_one_group(group, self.group, cond))
        # 5. weighted by the noise level
        loss = time_weight(schedule, t, self.b).to(loss) * loss
        gap = (y_t.detach() - y_r).square().flatten(1).mean(1).sqrt()
        yield Loss("student", loss.mean(), {"t": t, "loss": loss.detach(), "gap": gap})

    def _times(
        self, groups: int, rng: torch.Generator, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """t, r and s of each group: t and s uniform, or a step of a student's grid; r before t by the gap."""
        t, share = 1 - torch.rand(2, groups, generator=rng, dtype=torch.float64)
        on_grid = to_device(torch.rand(groups, generator=rng) < self.grid, device)
        t_grid, s_grid = steps_of_grids(groups, self.steps, rng, device)
        s = torch.where(on_grid, s_grid, to_device(t * (1 - share), device))
        t = torch.where(on_grid, t_grid, to_device(t, device))
        return t, torch.maximum(s, t - self.gap), s


def _sorted(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The batch in the order of its labels, if it has any."""
    if "class_labels" not in batch.cond:
        return batch.x0, dict(batch.cond)
    order = batch.cond["class_labels"].argsort(stable=True)
    return batch.x0[order], {key: value[order] for key, value in batch.cond.items()}
