"""Any schedule as straight lines: states scaled by 1 / (alpha + sigma), times by the share of noise.

With z = x_t / (alpha + sigma) and tau = sigma / (alpha + sigma), x_t = alpha x0 + sigma eps becomes
z = (1 - tau) x0 + tau eps, the path of flow matching (Lipman et al. 2023), at zero terminal SNR too. Its
velocity eps - x0 is linear in the two predictions of a denoiser, and an Euler step along it is a DDIM step:
what a method learns as a velocity, a stock DDIMScheduler draws.
"""

from __future__ import annotations

from torch import Tensor

from diffkd.core.denoiser import Predicted
from diffkd.core.schedules import Schedule


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
