"""What consistency methods share: f(x_t, t) is where the trajectory through x_t begins, and f(x, 0) = x.

The boundary needs no coefficients of its own: an x0 read from a prediction of v, flow or eps is x_t at t = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffkd.core import flow, samplers
from diffkd.core.denoiser import Denoiser
from diffkd.core.derivative import STEP, Derivative, directional
from diffkd.core.flow import flow_time, time_at
from diffkd.core.schedules import Schedule, read_prediction
from diffkd.errors import UserError
from diffkd.io.prefetch import to_device

NEAREST = 1e-3  # to the data, in t, that a difference goes
PARTS = 8  # of a batch, by which some of it are asked for


def check_start(start: Denoiser, steps: Sequence[int], guidance: float = 1.0) -> None:
    """Raises UserError for a model of which no consistency model of these step counts can be made."""
    for count in steps:
        start.schedule.check_steps(count, "renoise")
    if guidance != 1.0:
        start.check_guidance()
    if start.prediction == "sample" and not start.preconditioned:
        raise UserError(
            "a network that predicts x0 itself (prediction type sample) does not return its input at t = 0, "
            f"as a consistency model does; put {{name: output, prediction: {start.schedule.bounded}}} before "
            "this method, which makes it predict that"
        )
    start.check_from_noise()


def check_mode(
    mode: str, guidance: float, teacher: str = "original", sampler: str = "ddim", substeps: int = 1
) -> None:
    """Raises ValueError for settings of the teacher where none is asked."""
    if mode != "training":
        return
    if sampler != "ddim" or substeps != 1:
        name, value = ("sampler", sampler) if sampler != "ddim" else ("substeps", substeps)
        raise ValueError(
            f"{name}: {value} is of the teacher's step, which mode: training does not take; leave it out, or "
            "set mode: distillation"
        )
    if guidance != 1.0:
        raise ValueError(
            f"guidance {guidance:g} is the teacher's, whom mode: training does not ask; leave it out, or set "
            "mode: distillation"
        )
    if teacher != "original":
        raise ValueError(
            f"teacher: {teacher} is not asked in mode: training; leave it out, or set mode: distillation"
        )


def earlier(schedule: Schedule, t: Tensor, gap: float, k: float = 8.0, b: float = 1.0) -> Tensor:
    """The s of a consistency pair, (B,) -> float64 (B,): in flow time t (1 - gap n), or 0 if that is below.

    n = 1 + k sigmoid(-b sigma / alpha) widens it near the data (the mapping function of Geng et al. 2024).
    Its time is sigma / alpha, which is infinite at zero terminal SNR, and near the data equals the flow time.
    """
    tau = flow_time(schedule, t)
    n = 1 + k * torch.sigmoid(-b * tau / (1 - tau))
    return time_at(schedule, (tau * (1 - gap * n)).clamp(min=0))


def pair(
    schedule: Schedule,
    x0: Tensor,
    t: Tensor,
    s: Tensor,
    rng: torch.Generator,
    teacher: Denoiser | None = None,
    sampler: str = "ddim",
    substeps: int = 1,
    **asked: Any,
) -> tuple[Tensor, Tensor]:
    """x_t and x_s of one trajectory, each (B, ...): noised data with one noise, or x_s where the teacher's
    sampler goes from x_t. asked: of the teacher, conditioning and guidance."""
    eps = to_device(torch.randn(x0.shape, generator=rng), x0.device)
    alpha, sigma = schedule.at(t, like=x0)
    x_t = alpha * x0 + sigma * eps
    if teacher is not None:
        return x_t, solve(teacher, x_t, t, s, sampler, substeps, **asked)
    alpha, sigma = schedule.at(s, like=x0)
    return x_t, alpha * x0 + sigma * eps


@torch.no_grad()
def solve(
    teacher: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, sampler: str, substeps: int, **asked: Any
) -> Tensor:
    """Where the teacher's sampler goes from x_t in equal sub-steps from t to s, both (B,): (B, C, H, W)."""
    fractions = torch.arange(substeps + 1, dtype=torch.float64, device=t.device)[:, None] / substeps
    path = t + fractions * (s - t)
    path[-1] = s
    return samplers.find(sampler)(teacher, x_t, path, clip=None, noise=None, **asked)


def start_of(denoiser: Denoiser, x_s: Tensor, s: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
    """f(x_s, s): (B, ...), x_s itself where s = 0. t: (B,), above 0, the time that is asked there instead."""
    inside = s > 0
    found = denoiser(x_s, torch.where(inside, s, t), **cond)
    return torch.where(inside.reshape(-1, *[1] * (x_s.ndim - 1)), found, x_s)


def starts_of(denoiser: Denoiser, rows: Tensor, x_s: Tensor, s: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
    """`start_of` of some of a batch, which alone is asked for; x_s of all others: (B, ...).

    rows: (B,) booleans on the host, which ones. They are made up to a whole number of eighths of the batch,
    of one at least: a network is compiled for few sizes, and all processes call a sharded one together.
    """
    part = -(-len(rows) // PARTS)
    count = part * max(-(-int(rows.sum()) // part), 1)
    chosen = to_device(rows.argsort(descending=True, stable=True)[:count], x_s.device)
    asked = {key: value[chosen] for key, value in cond.items()}
    return x_s.index_copy(0, chosen, start_of(denoiser, x_s[chosen], s[chosen], t[chosen], **asked))


def tangent(
    student: Denoiser,
    x_t: Tensor,
    t: Tensor,
    output: Tensor,
    velocity: Tensor,
    share: float = 1.0,
    how: Derivative = "jvp",
    step: float = STEP,
    **cond: Any,
) -> Tensor:
    """g = cos(a) df/da along dx/da = velocity, not normalised: (B, C, H, W), without gradients.

    Lu & Song 2024, algorithm 1, for f = cos(a) x - sin(a) F, F = v:

        g = -cos² (F - dx/da) - r cos sin (x + dF/da)

    output: F at x_t, without gradients. share: r, of the part that can be unstable. step: of a difference, in
    t, which goes neither above 1 nor to 0. The derivative is taken in t, in which everything is finite:
    dF/da = (dF/dt) / (da/dt).
    """
    schedule = student.schedule
    cos, sin = schedule.at(t, like=x_t)
    d_cos, d_sin = flow.rates(schedule, t, like=x_t)
    da_dt = cos * d_sin - sin * d_cos

    def output_at(x: Tensor, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """F as a function of everything that changes with the angle."""
        raw = student.output(x, t, **cond).to(x.dtype)
        x0, eps = read_prediction(student.prediction, x, raw, cos, sin)
        value: Tensor = cos * eps - sin * x0
        return value

    along = (da_dt * velocity, torch.ones_like(t), d_cos, d_sin)
    span = (t - NEAREST).clamp(0, step), (1 - t).clamp(max=step)
    derivative = directional(output_at, (x_t, t, cos, sin), along, how, network=student.network, step=span)
    return -cos * cos * (output - velocity) - share * cos * sin * (x_t + derivative / da_dt)
