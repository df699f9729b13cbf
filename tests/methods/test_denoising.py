"""Denoising: against the mean squared error of v, written out."""

import math

import pytest
import torch

from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import FlowSchedule, Schedule, Shift
from diffkd.methods.base import Batch, Step
from diffkd.methods.denoising import Denoising

COSINE = Schedule.cosine(64)


def test_labels_are_dropped_and_the_default_weight_is_that_of_v():
    """With v's weight the loss is the mean squared error of v; labels are dropped at the given rate."""

    seen = []

    class Network(torch.nn.Module):
        def forward(self, x, time, class_labels):
            seen.append(class_labels.clone())
            return torch.zeros_like(x)

    denoiser = Denoiser(Network(), COSINE, "v_prediction", num_classes=3, null_label=3)
    method = Denoising(label_dropout=0.25)
    x0 = torch.rand(4000, 1, 2, 2) * 2 - 1
    batch = Batch(x0, {"class_labels": torch.arange(4000) % 3})
    loss = next(
        method.losses(
            {"student": denoiser},
            batch,
            Step(method.stages(denoiser)[0], 0),
            torch.Generator().manual_seed(0),
        )
    )
    assert abs((seen[0] == 3).float().mean() - 0.25) < 0.03
    kept = seen[0] != 3
    assert torch.equal(seen[0][kept], (torch.arange(4000) % 3)[kept])
    rng = torch.Generator().manual_seed(0)
    t = torch.randint(1, 65, (4000,), generator=rng).double() / 64
    eps = torch.randn(x0.shape, generator=rng)
    alpha, sigma = COSINE.at(t, like=x0.double())
    v = alpha * eps - sigma * x0
    assert loss.value.item() == pytest.approx(v.square().mean().item(), rel=1e-4)


def test_times_may_be_where_prompts_decide():
    """log_normal: on the grid of the schedule, the noise of a level that is normal."""
    seen = []

    class Network(torch.nn.Module):
        def forward(self, x, time):
            seen.append(time.clone())
            return torch.zeros_like(x)

    denoiser = Denoiser(Network(), Schedule.cosine(1024), "v_prediction")
    method = Denoising(times="log_normal", mean=1.2, std=0.5)
    step = Step(method.stages(denoiser)[0], 0)
    rng = torch.Generator().manual_seed(0)
    loss = next(method.losses({"student": denoiser}, Batch(torch.zeros(20_000, 1, 1, 1), {}), step, rng))
    t = loss.metrics["t"]
    assert torch.equal(t * 1024, (t * 1024).round()) and torch.equal(seen[0].double() + 1, t * 1024)
    levels = -denoiser.schedule.half_log_snr(t)
    assert levels.mean().item() == pytest.approx(1.2, abs=0.02)
    assert levels.std().item() == pytest.approx(0.5, abs=0.02)


def test_a_flow_learns_its_velocity_at_logit_normal_times():
    """Flow matching as Esser et al. 2024 train (equations 13 and 19), with the shift of their equation 23 in
    the law of the times: log(sigma / alpha) is the logit of sigma."""
    seen = []

    class Network(torch.nn.Module):
        def forward(self, x, time):
            seen.append(time / 1000)
            return torch.zeros_like(x)

    denoiser = Denoiser(Network(), FlowSchedule(Shift(3.0), 1000), "flow")
    method = Denoising(times="log_normal", mean=math.log(3), std=1.0, weight="flow")
    x0 = torch.rand(20_000, 1, 2, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
    step, rng = Step(method.stages(denoiser)[0], 0), torch.Generator().manual_seed(0)
    loss = next(method.losses({"student": denoiser}, Batch(x0, {}), step, rng))
    rng = torch.Generator().manual_seed(0)
    u = torch.sigmoid(torch.randn(20_000, generator=rng, dtype=torch.float64))  # before the shift
    sigma = 3 * u / (1 + 2 * u)
    assert torch.allclose(seen[0].double(), sigma, atol=1e-6)
    velocity = torch.randn(x0.shape, generator=rng) - x0
    assert loss.value.item() == pytest.approx(velocity.square().mean().item(), rel=1e-4)
