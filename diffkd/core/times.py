"""Laws of the times that training draws: (B,) float64 in (0, 1].

Those of noise levels, kappa = sigma / alpha (EDM's sigma), hold on any schedule. log kappa is the logit of
the flow time sigma / (alpha + sigma): where kappa is log-normal, the flow time is logit-normal.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from diffkd.core.schedules import Schedule
from diffkd.io.prefetch import to_device

TimeLaw = Literal["uniform", "log_normal"]


def draw_times(
    law: TimeLaw,
    schedule: Schedule,
    count: int,
    mean: float,
    std: float,
    rng: torch.Generator,
    device: torch.device,
) -> Tensor:
    """Uniform in t, or log kappa normal with this mean and std (Karras et al. 2022, table 1)."""
    if law == "uniform":
        return to_device(1 - torch.rand(count, generator=rng, dtype=torch.float64), device)
    levels = mean + std * torch.randn(count, generator=rng, dtype=torch.float64)
    return schedule.time_of(-to_device(levels, device))


def on_grid(t: Tensor, steps: int) -> Tensor:
    """The next of the grid i / steps, i = 1, ..., steps, at or above each t."""
    return ((t * steps).ceil().clamp(1, steps)) / steps


def times_above(
    schedule: Schedule, count: int, least: float, scale: float, rng: torch.Generator, device: torch.device
) -> Tensor:
    """kappa above `least`: log(kappa / least) half-Cauchy of this scale, which is its median.

    Its tail reaches the end of any schedule, t = 1.
    """
    share = torch.rand(count, generator=rng, dtype=torch.float64)
    levels = math.log(least) + scale * (math.pi / 2 * share).tan()
    return schedule.time_of(-to_device(levels, device))
