"""Regression onto pairs: its loss by hand, and a linear teacher learned exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from diffkd.core import samplers
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule, from_diffusers
from diffkd.errors import UserError
from diffkd.methods.base import Batch, Pairs, Step
from diffkd.methods.regression import Regression, distance
from tests.gaussian import gaussian
from tests.tiny import student

COSINE, LINEAR = Schedule.cosine(64), from_diffusers(DDPMScheduler())


def drawn(count: int, *, size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Noises, and the images that a Gaussian teacher makes of them in 16 steps, float64."""
    noise = torch.randn(count, 1, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return noise, samplers.sample(gaussian(COSINE), noise, 16)


def loss_of(method: Regression, net: Denoiser, noise: torch.Tensor, x0: torch.Tensor):
    step = Step(method.stages(net)[0], 0)
    (loss,) = method.losses({"student": net}, Batch(x0, {}, noise), step, torch.Generator())
    return loss


@pytest.mark.parametrize("huber", [0.0, 0.3])
def test_one_step_by_hand(huber):
    """The network's v at the last index of the table, from the noise alone; its x0 against the image."""
    net = student(None, "v_prediction", COSINE)
    net.network.double()
    noise, x0 = drawn(5, size=8)
    found = loss_of(Regression(huber=huber), net, noise, x0)
    with torch.no_grad():
        v = net.network(noise, torch.full((5,), 63.0, dtype=torch.float64)).sample.numpy()
    error = np.sqrt(((-v - x0.numpy()) ** 2).reshape(5, -1).mean(1))  # alpha = 0: x0 = -v
    expected = error**2 / 2 if huber == 0 else huber * (np.sqrt(error**2 + huber**2) - huber)
    assert found.value.item() == pytest.approx(expected.mean(), rel=1e-9)
    assert found.metrics["gap"].numpy() == pytest.approx(error, rel=1e-9)


def test_small_errors_are_squared_and_large_ones_linear():
    zero = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    assert distance(zero + 1e-4, zero, 0.5)[0].item() == pytest.approx(1e-8 / 2, rel=1e-6)
    assert distance(zero + 1e4, zero, 0.5)[0].item() == pytest.approx(0.5 * (1e4 - 0.5), rel=1e-6)
    assert distance(zero + 3, zero, 0)[1].item() == 4.5


class Linear(nn.Module):
    """x0 = a + b x."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (-0.4, 0.1))

    def forward(self, x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return self.a + self.b * x_t


def test_a_linear_teacher_is_learned_exactly():
    """A Gaussian's images are linear in their noise: the loss has its minimum, 0, at that map."""
    net, method = Denoiser(Linear(), COSINE, "sample", shape=(1, 4, 4)), Regression()
    noise, x0 = drawn(64)
    newton = torch.optim.LBFGS(net.parameters(), max_iter=20, tolerance_grad=1e-14, tolerance_change=1e-16)

    def closure() -> torch.Tensor:
        newton.zero_grad()
        loss = loss_of(method, net, noise, x0).value
        loss.backward()
        return loss

    newton.step(closure)
    assert loss_of(method, net, noise, x0).value < 1e-18
    fresh = torch.randn(8, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        one, sixteen = samplers.sample(net, fresh, 1), samplers.sample(gaussian(COSINE), fresh, 16)
    assert torch.allclose(one, sixteen, atol=1e-9)


def test_its_stage():
    assert Regression().stages(gaussian(LINEAR, "epsilon"))[0].prediction == "v_prediction"
    method = Regression(pairs=7, pair_steps=5, sampler="heun", teacher="previous", updates=9)
    (stage,) = method.stages(gaussian(LINEAR, "v_prediction"))
    assert (stage.name, stage.steps, stage.updates, stage.prediction) == ("1-steps", 1, 9, None)
    assert stage.pairs == Pairs(7, 5, "heun") and stage.teacher == "previous"
    with pytest.raises(UserError, match="guidance needs a label"):
        Regression(guidance=2).stages(gaussian(COSINE))


def test_the_noise_itself_goes_in_where_the_schedule_ends_before_pure_noise():
    """What is sampled starts from N(0, I), not from alpha x0 + sigma eps."""
    seen = []

    class Watched(nn.Module):
        def forward(self, x_t, time):
            seen.append((x_t, time))
            return x_t

    noise, x0 = drawn(3)
    loss = loss_of(Regression(), Denoiser(Watched(), LINEAR, "sample", shape=(1, 4, 4)), noise, x0)
    assert torch.equal(seen[0][0], noise) and seen[0][1].tolist() == [999.0] * 3
    assert math.isfinite(loss.value)
