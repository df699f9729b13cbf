"""Progressive distillation (Salimans & Ho 2022, algorithm 2): one step learns several of the teacher's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffkd.core import samplers
from diffkd.core.denoiser import Denoiser
from diffkd.core.losses import Weighting, squared_error, weight_at
from diffkd.core.noise import add_noise, grid_times
from diffkd.errors import UserError
from diffkd.io.config import Positive
from diffkd.io.prefetch import to_device
from diffkd.methods.base import Batch, Loss, Method, Needs, Stage, Step

Rate = Annotated[float, Field(gt=0)]
MOST_STEPS = 100_000


def target(
    teacher: Denoiser,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    substeps: int = 2,
    sampler: str = "ddim",
    *,
    noise: samplers.Noise | None = None,
    **cond: Any,
) -> Tensor:
    """The x0 whose one DDIM step from t lands where `substeps` steps of the teacher's sampler land at s.

    x_t: (B, C, H, W); t, s: (B,), s < t. Returns (B, C, H, W) float64. Salimans & Ho 2022, appendix G, for
    any sampler and number of steps. It subtracts near-equal states, so it is computed in float64, and it is
    never clipped. At s = 0, where sigma_s = 0, it is x_s itself. noise: the source of a stochastic sampler.
    cond: class_labels, guidance, eta.
    """
    x_t, t, s = x_t.double(), t.double(), s.double()
    fractions = torch.arange(substeps + 1, dtype=torch.float64, device=t.device)[:, None] / substeps
    times = t + fractions * (s - t)
    times[-1] = s
    with torch.inference_mode():
        x_s = samplers.find(sampler)(teacher, x_t, times, clip=None, noise=noise, **cond)
    alpha_t, sigma_t = teacher.schedule.at(t, like=x_t)
    alpha_s, sigma_s = teacher.schedule.at(s, like=x_t)
    ratio = sigma_s / sigma_t
    return (x_s - ratio * x_t) / (alpha_s - ratio * alpha_t)


class Progressive(Method):
    """Progressive distillation: each stage's student takes one step where its teacher took several."""

    reference: ClassVar[str] = "Salimans & Ho 2022, https://arxiv.org/abs/2202.00512"
    needs: ClassVar[Needs] = Needs(
        calls="1 student, substeps of the teacher, 2 where steps are halved",
        passes={"student": 1, "teacher": 2},
    )

    steps: list[Annotated[int, Field(le=MOST_STEPS)]] = Field(
        [32, 16, 8, 4, 2, 1], min_length=1, description="step counts of the students, in order"
    )
    substeps: int = Field(
        2, ge=1, le=MOST_STEPS, description="teacher steps that one step of the first student replaces"
    )
    sampler: samplers.SamplerName = Field(
        "ddim", description="of the teacher in the first target; students step by ddim"
    )
    eta: float | None = Field(None, ge=0, le=1, description="noise of the ancestral sampler, 0 to 1")
    guidance: float = Field(
        1.0, ge=0, description="guidance weight baked into the first target; 1 is unguided"
    )
    weight: Weighting = Field(
        "truncated_snr", description="weight of the squared error in x0; stage 0 uses snr"
    )
    gamma: float = Field(5.0, gt=0, description="bound of the min_snr weight")
    alpha: float = Field(
        1.0, ge=0, le=1, description="share of the distillation loss; the rest denoises the data"
    )
    updates: Positive | list[Positive] = Field(
        250,
        description="updates of a stage, twice as many for 2 and 1 steps; or a list, one for each of steps",
    )
    updates_v: int | None = Field(
        None, ge=1, description="updates of stage 0 of an epsilon teacher; default the first"
    )
    learning_rate: Rate | list[Rate] = Field(
        5e-4,
        description="at a stage's start, falls linearly to zero over it; or a list, one for each of steps",
    )
    warmup: int = Field(0, ge=0, description="updates of a stage over which the learning rate rises")

    @model_validator(mode="after")
    def _steps_decrease(self) -> Progressive:
        for before, after in zip(self.steps[:-1], self.steps[1:], strict=True):
            if after >= before or after < 1:
                raise ValueError(
                    f"steps {self.steps} do not decrease ({before} then {after}); list the largest first"
                )
            if before % after:
                raise ValueError(
                    f"steps {before} to {after} is not a whole number of teacher steps per student step; "
                    f"after {before} use one of {_proper_divisors(before)}"
                )
        for name, value in (("updates", self.updates), ("learning_rate", self.learning_rate)):
            if isinstance(value, list) and len(value) != len(self.steps):
                raise ValueError(
                    f"{name} has {len(value)} entries for {len(self.steps)} steps; give one for each"
                )
        if self.eta is not None and self.sampler != "ancestral":
            raise ValueError(
                f"eta belongs to the ancestral sampler, and sampler is {self.sampler}; set sampler: ancestral"
            )
        return self

    def learns_what_data_is(self) -> bool:
        """By the share that denoises it."""
        return self.alpha < 1

    def stages(self, start: Denoiser) -> list[Stage]:
        """One stage per step count, and before them stage 0 for an epsilon teacher.

        An epsilon network cannot take one step from (almost) pure noise, so stage 0 turns it into what the
        schedule has for that, v-prediction on a table of betas, at the teacher's own step count, with the
        teacher's own predictions as targets.
        """
        for steps in self.steps:
            start.schedule.check_steps(steps)
        if self.guidance != 1.0:
            start.check_guidance()
        stages: list[Stage] = []
        guidance, sampler = self.guidance, self.sampler
        before = self.steps[0] * self.substeps
        updates, rates = self._updates(), self._rates()
        if start.prediction == "epsilon":
            start.schedule.check_steps(before)
            stages.append(
                Stage(
                    f"{before}-steps",
                    self.updates_v or updates[0],
                    rates[0],
                    self.warmup,
                    before,
                    sampler="ddim",
                    guidance=guidance,
                    prediction=start.schedule.bounded,
                )  # fmt: skip
            )
            guidance = 1.0
        if before > start.schedule.num_train_timesteps:
            raise UserError(
                f"{self.steps[0]} steps of {self.substeps} sub-steps each are more than the teacher's "
                f"{start.schedule.num_train_timesteps} time steps; use fewer of either"
            )
        for steps, count, rate in zip(self.steps, updates, rates, strict=True):
            stages.append(
                Stage(f"{steps}-steps", count, rate, self.warmup, steps, before // steps, sampler, guidance)
            )
            before, guidance, sampler = steps, 1.0, "ddim"
        return stages

    def _updates(self) -> list[int]:
        if isinstance(self.updates, list):
            return self.updates
        return [self.updates * (2 if steps <= 2 else 1) for steps in self.steps]

    def _rates(self) -> list[float]:
        return (
            self.learning_rate
            if isinstance(self.learning_rate, list)
            else [self.learning_rate] * len(self.steps)
        )

    def losses(
        self, nets: Mapping[str, Any], batch: Batch, step: Step, rng: torch.Generator
    ) -> Iterator[Loss]:
        student, teacher, stage = nets["student"], nets["teacher"], step.stage
        assert stage.steps is not None and stage.sampler is not None
        x0 = batch.x0
        # 1. a step of the student's grid, t = i / N to s = (i - 1) / N
        t, s = grid_times(len(x0), stage.steps, rng, x0.device)
        # 2. noise the data
        x_t = add_noise(student.schedule, x0, t, rng)
        # 3. where the teacher's sub-steps land, expressed as an x0
        cond: dict[str, Any] = dict(batch.cond)
        extra = {"eta": self.eta} if self.eta is not None and stage.sampler == "ancestral" else {}
        x0_target = target(
            teacher,
            x_t,
            t,
            s,
            stage.substeps,
            stage.sampler,
            guidance=stage.guidance,
            noise=lambda x: to_device(torch.randn(x.shape, generator=rng, dtype=x.dtype), x.device),
            **extra,
            **cond,
        ).float()
        # 4. the student's one step
        denoised = student(x_t, t, **cond)
        # near noise an epsilon teacher's x0 is its eps amplified beyond use, while its eps is good everywhere
        name: Weighting = "snr" if stage.prediction is not None else self.weight
        w = weight_at(name, student.schedule, t, gamma=self.gamma)
        gap = squared_error(denoised, x0_target)
        loss = w * gap
        if self.alpha < 1:
            loss = self.alpha * loss + (1 - self.alpha) * w * squared_error(denoised, x0)
        yield Loss("student", loss.mean(), {"t": t, "loss": loss.detach(), "gap": gap.detach().sqrt()})


def _proper_divisors(number: int) -> str:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return ", ".join(map(str, sorted({*small, *(number // n for n in small)} - {number}, reverse=True)))
