"""What every flow map must do: learn to carry noise where the exact flow does, in steps of any length."""

from __future__ import annotations

import torch

from diffkd.core import samplers
from diffkd.core.schedules import Schedule
from diffkd.methods.base import Batch, Method, Step
from tests.gaussian import flow, gaussian, linear


def trained(method: Method, schedule: Schedule, updates: int) -> tuple[list[float], list[float]]:
    """RMS errors of a linear student in one step and in two, before and after these updates of the method's
    first stage, from a Gaussian teacher."""
    teacher, student = gaussian(schedule, "v_prediction"), linear(schedule)
    optimizer = torch.optim.Adam(student.network.parameters())
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(500, 1, 2, 2, dtype=torch.float64, generator=rng)
    expected = flow(schedule, noise, torch.ones(500).double(), torch.zeros(500).double())

    @torch.no_grad()
    def errors() -> list[float]:
        drawn = [
            samplers.ddim(student, noise, samplers.grid(n), interval=torch.full((500,), 1 / n).double())
            for n in (1, 2)
        ]
        return [(x0 - expected).square().mean().sqrt().item() for x0 in drawn]

    before, stage = errors(), method.stages(teacher)[0]
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - update / updates)
        x0 = 0.3 + 0.5 * torch.randn(128, 1, 2, 2, generator=rng)
        nets = {"student": student, "teacher": teacher}
        loss = next(method.losses(nets, Batch(x0, {}), Step(stage, update), rng))
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
    return before, errors()
