"""Shortcut models (Frans et al. 2024): one step of a length lands where two of half of it do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffkd.core import flow, samplers
from diffkd.core.averages import follow
from diffkd.core.consistency import check_mode
from diffkd.core.denoiser import Denoiser, Predicted
from diffkd.core.losses import squared_error
from diffkd.core.noise import grid_times, steps_of_grids
from diffkd.io.config import Positive
from diffkd.io.prefetch import to_device
from diffkd.methods import settings
from diffkd.methods.base import Batch, Loss, Method, Needs, Stage, Step
from diffkd.models.students.copies import copy_of


@torch.no_grad()
def target(student: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, half: Tensor, **cond: Any) -> Tensor:
    """The average velocity of two steps of the student from t to s by way of their middle: (B, C, H, W).

    x_t: (B, C, H, W); t, s: (B,), s < t. half: (B,), the length that the student is given. Frans et al. 2024
    (self-consistency), for steps that are even in t, and so not quite in the flow's time. In float64, as it
    subtracts states.
    """
    x_t = x_t.double()
    x_s = samplers.ddim(student, x_t, torch.stack([t, (t + s) / 2, s]), interval=half, **cond)
    z_t, z_s = (x / flow.scale(student.schedule, time, like=x) for time, x in ((t, x_t), (s, x_s)))
    length = flow.flow_time(student.schedule, t) - flow.flow_time(student.schedule, s)
    return (z_t - z_s) / length.reshape(-1, *[1] * (x_t.ndim - 1))


class Shortcut(Method):
    """One network for 1, 2, 4, ... steps: the finest is the velocity, each learns from the next finer."""

    reference: ClassVar[str] = "Frans et al. 2024, https://arxiv.org/abs/2410.12557"
    needs: ClassVar[Needs] = Needs(
        networks=("target with target_decay",),
        memory="weights of target, with target_decay",
        in_short="(weights)",
        calls="1 student, 2 of it (or of target) for a quarter of the batch, 1 teacher for the rest",
        passes={"student": 1.5, "teacher": 0.75},
    )

    mode: Literal["distillation", "training"] = Field(
        "distillation", description="whose velocity is learned: the teacher's, or that of each noised image"
    )
    teacher: settings.Teacher = "original"
    steps: list[Positive] = Field(
        [4, 2, 1], min_length=1, description="step counts that a student is saved for, powers of two"
    )
    finest: int = Field(
        64,
        ge=2,
        le=1 << 16,
        description="steps of the finest grid, a power of two; its step counts as the velocity",
    )
    guidance: float = Field(1.0, ge=0, description="guidance weight baked in; 1 is unguided")
    share: float = Field(
        0.25, ge=0, le=1, description="of examples that learn two steps in one; the others learn the velocity"
    )
    target_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of the averaged student that takes the two steps, 0.999 in the paper; 0: itself",
    )
    updates: int = Field(2000, ge=1, description="updates in all")
    learning_rate: float = Field(6e-4, gt=0, description="after the warm-up; falls linearly to zero")
    warmup: int = Field(50, ge=0, description="updates over which the learning rate rises")

    @model_validator(mode="after")
    def _powers_of_two(self) -> Shortcut:
        check_mode(self.mode, self.guidance, self.teacher)
        if self.finest & (self.finest - 1):
            raise ValueError(f"finest {self.finest} is not a power of two; use one, such as 64")
        for steps in self.steps:
            if steps & (steps - 1) or steps >= self.finest:
                raise ValueError(
                    f"steps {steps} is not a power of two below finest {self.finest}; use 1, 2, 4, ..., "
                    f"{self.finest // 2}, or a larger finest"
                )
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

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        return {"target": copy_of(student).requires_grad_(False)} if self.target_decay else {}

    def losses(
        self, nets: Mapping[str, Any], batch: Batch, step: Step, rng: torch.Generator
    ) -> Iterator[Loss]:
        student, x0, cond = nets["student"], batch.x0, batch.cond
        count, device = len(x0), x0.device
        # 1. times: the first k examples, in the mean a share, learn steps of 1, 1/2, ...; the others length 0
        k = int(self.share * count + torch.rand((), generator=rng, dtype=torch.float64).item())
        grids = [2**i for i in range(self.finest.bit_length() - 1)]
        t, s = steps_of_grids(count, grids, rng, device)
        fine, _ = grid_times(count, self.finest, rng, device)
        t = torch.cat([t[:k], fine[k:]])
        length = torch.cat([(t - s)[:k], torch.zeros_like(fine[k:])])
        # 2. noise the data
        eps = to_device(torch.randn(x0.shape, generator=rng), device)
        alpha, sigma = student.schedule.at(t, like=x0)
        x_t, predicted = alpha * x0 + sigma * eps, Predicted(x0[k:], eps[k:])
        # 3. the student's average velocity
        u = flow.velocity(student.predict(x_t, t, interval=length, **cond))
        # 4. its target: two steps of half the length, where the finest is 0, of the student or its average;
        # for the others the velocity
        parts = []
        if k:
            first, half = {key: value[:k] for key, value in cond.items()}, length[:k] / 2
            half = torch.where(half > 1 / self.finest, half, 0.0)
            two = target(nets.get("target", student), x_t[:k], t[:k], s[:k], half, **first)
            parts.append(two.to(u.dtype))
        if k < count:
            if self.mode == "distillation":
                others = {key: value[k:] for key, value in cond.items()}
                with torch.no_grad():
                    predicted = nets["teacher"].predict(
                        x_t[k:], t[k:], guidance=step.stage.guidance, **others
                    )
            parts.append(flow.velocity(predicted))
        # 5. the squared error
        error = squared_error(u, torch.cat(parts))
        yield Loss("student", error.mean(), {"t": t, "loss": error.detach(), "gap": error.detach().sqrt()})

    def after_update(self, nets: Mapping[str, Any], step: Step) -> None:
        if "target" in nets:
            follow(nets["target"], nets["student"], self.target_decay)
