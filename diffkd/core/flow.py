"""Any schedule as straight lines: states scaled by 1 / (alpha + sigma), times by the share of noise.

With z = x_t / (alpha + sigma) and tau = sigma / (alpha + sigma), x_t = alpha x0 + sigma eps becomes
z = (1 - tau) x0 + tau eps, the path of flow matching (Lipman et al. 2023), at zero terminal SNR too. Its
velocity eps - x0 is linear in the two predictions of a denoiser, and an Euler step along it is a DDIM step:
what a method learns as a velocity, a stock DDIMScheduler draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffkd.core.denoiser import Denoiser, Predicted
from diffkd.core.derivative import STEP, Derivative, directional
from diffkd.core.schedules import Schedule, read_prediction

SHORTEST = 1e-3  # half the span of a difference along a trajectory, against rounding
_APART = 1e-5  # half the span of one of the schedule's: less than half a cell of any table


def flow_time(schedule: Schedule, t: Tensor) -> Tensor:
    """tau in [0, 1]: (B,) -> float64 (B,)."""
    alpha, sigma = schedule.at(t)
    tau: Tensor = sigma / (alpha + sigma)
    return tau


def time_at(schedule: Schedule, tau: Tensor) -> Tensor:
    """The t of a flow time, the inverse of `flow_time`: (B,) -> float64 (B,)."""
    tau = tau.double()
    return schedule.time_of((1 - tau).log() - tau.log())


def scale(schedule: Schedule, t: Tensor, like: Tensor) -> Tensor:
    """alpha + sigma, by which x_t is the state of the flow, shaped to multiply `like`."""
    alpha, sigma = schedule.at(t, like=like)
    total: Tensor = alpha + sigma
    return total


def velocity(predicted: Predicted) -> Tensor:
    """dz / dtau = eps - x0, (B, C, H, W)."""
    return predicted.eps - predicted.x0


def rates(schedule: Schedule, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """d alpha / dt and d sigma / dt, in the dtype of `like` and shaped to multiply it. At a kink of the
    schedule the mean of both sides, at an end that of the inside."""
    t = t.double()
    after, before = (t + _APART).clamp(max=1), (t - _APART).clamp(min=0)
    span, shape = after - before, (-1,) + (1,) * (like.ndim - 1)
    found = [
        ((ahead - behind) / span).to(like.dtype).reshape(shape)
        for ahead, behind in zip(schedule.at(after), schedule.at(before), strict=True)
    ]
    return found[0], found[1]


def average_velocity(
    student: Denoiser,
    x_t: Tensor,
    t: Tensor,
    r: Tensor,
    predicted: Predicted,
    derivative: Derivative = "jvp",
    step: float = STEP,
    **cond: Any,
) -> Tensor:
    """The average velocity from t to r by the MeanFlow identity: v - (tau_t - tau_r) du/dtau of the student.

    x_t: (B, C, H, W); t, r: (B,), r <= t. predicted: x0 and eps of x_t, by the data or by a teacher, along
    which the state moves. step: of a difference, which goes neither above t = 1 nor below r. Returns
    (B, C, H, W), without gradients. Geng et al. 2025, equations 6, 8 and 10, with the flow's time tau and
    velocity eps - x0 of any schedule. The derivative is taken in t, in which everything is finite:
    du/dtau = (du/dt) / (dtau/dt).
    """
    alpha, sigma = student.schedule.at(t, like=x_t)
    d_alpha, d_sigma = rates(student.schedule, t, like=x_t)

    def u(x: Tensor, time: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        output = student.output(x, time, interval=time - r, **cond).to(x.dtype)
        return velocity(Predicted(*read_prediction(student.prediction, x, output, alpha, sigma)))

    moving = d_alpha * predicted.x0 + d_sigma * predicted.eps
    tangents = (moving, torch.ones_like(t), d_alpha, d_sigma)
    behind = (t - r).clamp(SHORTEST, step)
    span = behind, torch.minimum(behind, 1 - t)
    du_dt = directional(u, (x_t, t, alpha, sigma), tangents, derivative, network=student.network, step=span)
    dtau_dt = (d_sigma * alpha - d_alpha * sigma) / (alpha + sigma) ** 2
    length = flow_time(student.schedule, t) - flow_time(student.schedule, r)
    return velocity(predicted) - length.to(dtau_dt).reshape(dtau_dt.shape) / dtau_dt * du_dt


def check_start(start: Denoiser, steps: Sequence[int], guidance: float = 1.0) -> None:
    """Raises UserError for a model that cannot become a velocity, drawn in these step counts."""
    for count in steps:
        start.schedule.check_steps(count)
    if guidance != 1.0:
        start.check_guidance()
    start.check_from_noise()
