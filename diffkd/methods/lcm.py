"""LCM (Luo et al. 2023): consistency along a guided teacher, in strides over its table of times."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diffkd.core.averages import follow
from diffkd.core.consistency import check_start, solve, start_of
from diffkd.core.denoiser import Denoiser
from diffkd.core.losses import pseudo_huber, squared_error
from diffkd.core.noise import add_noise, grid_times
from diffkd.errors import UserError
from diffkd.io.config import Positive
from diffkd.io.prefetch import to_device
from diffkd.methods import settings
from diffkd.methods.base import Batch, Loss, Method, Needs, Stage, Step
from diffkd.models.students.copies import copy_of


class LCM(Method):
    """Latent consistency models: a guided teacher's step of k table entries, a target network behind."""

    reference: ClassVar[str] = "Luo et al. 2023, https://arxiv.org/abs/2310.04378"
    needs: ClassVar[Needs] = Needs(
        networks=("target",),
        memory="weights of target",
        in_short="weights",
        calls="1 student, 1 target, substeps of the teacher",
        passes={"student": 1, "teacher": 1, "target": 1},
    )

    teacher: settings.Teacher = "original"
    steps: list[Positive] = Field(
        [4, 2, 1], min_length=1, description="step counts that a student is saved for"
    )
    skip: int = Field(20, ge=1, description="entries of the teacher's table from t to s, k in the paper")
    times: Literal["table", "strides"] = Field(
        "table",
        description="t is any entry of the table, or t = 1 and what lies whole multiples of skip below",
    )
    sampler: settings.Solver = "ddim"
    substeps: int = Field(1, ge=1, description="teacher steps from t to s")
    guidance: Annotated[float, Field(ge=0)] | settings.Range = Field(
        1.0,
        description="guidance weight baked in, 1 for none; or least and largest of one that is an input of "
        "the student, such as [3, 15]",
    )
    target_decay: float = Field(
        0.95,
        ge=0,
        lt=1,
        description="decay of the averaged student that gives the targets; 0: the student itself",
    )
    huber: float = Field(0.001, ge=0, description="c of the pseudo-Huber distance of each number")
    updates: int = Field(2000, ge=1, description="updates in all")
    learning_rate: float = Field(3e-4, gt=0, description="after the warm-up; falls linearly to zero")
    warmup: int = Field(20, ge=0, description="updates over which the learning rate rises")

    def stages(self, start: Denoiser) -> list[Stage]:
        total = start.schedule.num_train_timesteps
        if self.skip > total:
            raise UserError(
                f"method.skip {self.skip} is more than the teacher's {total} time steps; use a smaller one"
            )
        for steps in self.steps:
            if self.times == "strides" and steps > 1 and total % (steps * self.skip):
                raise UserError(
                    f"a student of {steps} steps is asked at every {total / steps:g}th time step of {total}, "
                    f"which method.skip {self.skip} does not divide, and with times: strides it learns at no "
                    "other; use a skip that does, or times: table"
                )
        as_input = None if isinstance(self.guidance, float) else self.guidance
        baked_in = self.guidance if isinstance(self.guidance, float) else 1.0
        check_start(start, self.steps, baked_in if as_input is None else as_input[1])
        return [
            Stage.for_steps(
                self.steps, self.updates, self.learning_rate, self.warmup,
                substeps=self.substeps, sampler=self.sampler, guidance=baked_in, guidance_range=as_input,
                drawn="renoise", teacher=self.teacher, every_time=True,
            )
        ]  # fmt: skip

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        return {"target": copy_of(student).requires_grad_(False)} if self.target_decay else {}

    def losses(
        self, nets: Mapping[str, Any], batch: Batch, step: Step, rng: torch.Generator
    ) -> Iterator[Loss]:
        student, teacher, x0 = nets["student"], nets["teacher"], batch.x0
        cond: dict[str, Any] = dict(batch.cond)
        # 1. an entry of the teacher's table, and the one k before it
        total = student.schedule.num_train_timesteps
        t = self._times(len(x0), total, rng, x0.device)
        s = (t - self.skip / total).clamp(min=0)
        # 2. the noised data, and a guided step of the teacher
        x_t = add_noise(student.schedule, x0, t, rng)
        with torch.no_grad():
            w = step.stage.guidance
            x_s = solve(teacher, x_t, t, s, self.sampler, self.substeps, guidance=w, **cond)
            # 3. what the averaged student makes of x_s
            target = start_of(nets.get("target", student), x_s, s, t, **cond)
        # 4. L = d(f(x_t, t), target)
        denoised = student(x_t, t, **cond)
        loss = _distance(denoised, target, self.huber)
        gap = squared_error(denoised.detach(), target).sqrt()
        yield Loss("student", loss.mean(), {"t": t, "loss": loss.detach(), "gap": gap})

    def _times(self, count: int, total: int, rng: torch.Generator, device: torch.device) -> Tensor:
        if self.times == "table":
            return grid_times(count, total, rng, device)[0]
        strides = torch.randint(math.ceil(total / self.skip), (count,), generator=rng)
        return to_device((total - self.skip * strides).double() / total, device)

    def after_update(self, nets: Mapping[str, Any], step: Step) -> None:
        if "target" in nets:
            follow(nets["target"], nets["student"], self.target_decay)


def _distance(x: Tensor, y: Tensor, c: float) -> Tensor:
    """Mean over an image's numbers of their own pseudo-Huber distance: two (B, ...) -> (B,)."""
    return pseudo_huber(x.reshape(-1, 1), y.reshape(-1, 1), c).reshape(len(x), -1).mean(1)
