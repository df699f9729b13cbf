"""Any schedule as straight lines: states scaled by 1 / (alpha + sigma), times by the share of noise.

With z = x_t / (alpha + sigma) and tau = sigma / (alpha + sigma), x_t = alpha x0 + sigma eps becomes
z = (1 - tau) x0 + tau eps, the path of flow matching (Lipman et al. 2023), at zero terminal SNR too. Its
velocity eps - x0 is linear in the two predictions of a denoiser, and an Euler step along it is a DDIM step:
what a method learns as a velocity, a stock DDIMScheduler draws.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffkd.core.denoiser import Denoiser, Predicted
from diffkd.core.schedules import Schedule

_APART = 1e-5  # half the span of a difference in t: less than half a cell of any table


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


def check_start(start: Denoiser, steps: Sequence[int], guidance: float = 1.0) -> None:
    """Raises UserError for a model that cannot become a velocity, drawn in these step counts."""
    for count in steps:
        start.schedule.check_steps(count)
    if guidance != 1.0:
        start.check_guidance()
    start.check_from_noise()
