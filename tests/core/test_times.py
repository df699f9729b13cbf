import math

import pytest
import torch
from diffusers import DDPMScheduler

from diffkd.core.schedules import Schedule, from_diffusers
from diffkd.core.times import draw_times, on_grid, times_above

COSINE = Schedule.cosine(1024)
LINEAR = from_diffusers(DDPMScheduler())
CPU = torch.device("cpu")


def levels(schedule, t):
    return -schedule.half_log_snr(t)


@pytest.mark.parametrize("schedule", [COSINE, LINEAR])
def test_a_log_normal_noise_level(schedule):
    rng = torch.Generator().manual_seed(0)
    t = draw_times("log_normal", schedule, 10_000, -1.0, 1.0, rng, CPU)
    assert t.dtype == torch.float64 and (t > 0).all() and (t <= 1).all()
    expected = -1.0 + torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(levels(schedule, t), expected, atol=1e-6)


def test_times_on_a_grid():
    t = torch.tensor([1e-9, 0.1, 0.25, 0.2500001, 0.99, 1.0], dtype=torch.float64)
    assert on_grid(t, 4).tolist() == [0.25, 0.25, 0.25, 0.5, 1.0, 1.0]


def test_uniform_times_reach_one_and_not_zero():
    t = draw_times("uniform", COSINE, 100_000, 0, 1, torch.Generator().manual_seed(0), CPU)
    assert (t > 0).all() and (t <= 1).all()
    assert torch.allclose(t.histc(10, 0, 1) / 1e5, torch.tensor(0.1).double(), atol=0.005)


@pytest.mark.parametrize("schedule", [COSINE, LINEAR])
def test_levels_above_a_least_one_are_half_cauchy(schedule):
    t = times_above(schedule, 40_000, 0.5, 0.7, torch.Generator().manual_seed(0), CPU)
    level = levels(schedule, t) - math.log(0.5)
    assert (level > -1e-9).all() and (t <= 1).all()
    for share in (0.25, 0.5, 0.75):
        assert (level < 0.7 * math.tan(math.pi / 2 * share)).double().mean().item() == pytest.approx(
            share, abs=0.015
        )
    assert (t == 1).any()  # beyond what the schedule ends with
