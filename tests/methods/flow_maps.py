"""What every flow map must do: learn to carry noise where the exact flow does, in steps of any length."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from diffkd.core import samplers
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule
from diffkd.methods.base import Batch, Method, Step
from tests.gaussian import flow, gaussian, linear


def fit(method: Method, schedule: Schedule, updates: int, batch: int = 128) -> Iterator[Denoiser]:
    """A linear student before and after these updates of a method's first stage, from a Gaussian teacher."""
    teacher, student = gaussian(schedule, "v_prediction"), linear(schedule)
    optimizer = torch.optim.Adam(student.network.parameters())
    rng = torch.Generator().manual_seed(0)
    nets = {"student": student, "teacher": teacher, **method.networks(teacher, student)}
    yield student
    stage = method.stages(teacher)[0]
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - update / updates)
        x0 = 0.3 + 0.5 * torch.randn(batch, 1, 2, 2, generator=rng)
        loss = next(method.losses(nets, Batch(x0, {}), Step(stage, update), rng))
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
        method.after_update(nets, Step(stage, update))
    yield student


@torch.no_grad()
def drawn(student: Denoiser, noise: Tensor, steps: int) -> Tensor:
    """The student's x0 of a noise, (B, C, H, W), in so many steps of equal length."""
    length = torch.full((len(noise),), 1 / steps, dtype=torch.float64)
    return samplers.ddim(student, noise, samplers.grid(steps), interval=length)


def trained(method: Method, schedule: Schedule, updates: int) -> tuple[list[float], list[float]]:
    """RMS errors of such a student in one step and in two, before and after."""
    noise = torch.randn(500, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = flow(schedule, noise, torch.ones(500).double(), torch.zeros(500).double())
    before, after = (
        [(drawn(student, noise, n) - expected).square().mean().sqrt().item() for n in (1, 2)]
        for student in fit(method, schedule, updates)
    )
    return before, after


def moments(student: Denoiser, steps: int) -> tuple[float, float]:
    """The mean and the standard deviation of what a linear student draws, exactly: their sum is its x0 of a
    noise of one."""
    zero = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    mean = drawn(student, zero, steps).mean().item()
    return mean, drawn(student, zero + 1, steps).mean().item() - mean
