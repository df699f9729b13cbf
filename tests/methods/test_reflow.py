"""Reflow: its loss by hand; straight flows in closed form, which every step count draws alike."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from pydantic import ValidationError
from torch import nn

from diffkd.core import flow, samplers
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule, from_diffusers
from diffkd.errors import UserError
from diffkd.methods.base import Batch, Pairs, Step
from diffkd.methods.reflow import Reflow, line
from tests.gaussian import flow as exact_flow
from tests.gaussian import gaussian
from tests.tiny import student

COSINE, LINEAR = Schedule.cosine(64), from_diffusers(DDPMScheduler())
MEAN, STD = 0.3, 0.5


def drawn(schedule: Schedule, count: int, *, size: int = 4, seed: int = 1):
    """Noises, and the images that the exact flow of a Gaussian teacher makes of them, float64."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 1, size, size, dtype=torch.float64, generator=generator)
    one = torch.ones(count, dtype=torch.float64)
    return noise, exact_flow(schedule, noise, one, 0 * one, MEAN, STD)


class Straight(nn.Module):
    """The straight flow of images a + b noise, in closed form: x0 of a state on its line; off by `bias`."""

    def __init__(self, schedule: Schedule, bias: float = 0.0) -> None:
        super().__init__()
        self.schedule, self.bias = schedule, nn.Parameter(torch.tensor(bias, dtype=torch.float64))
        noise, x0 = drawn(schedule, 2)
        difference = (noise[0] - noise[1]).flatten()[0]
        self.b = ((x0[0] - x0[1]).flatten()[0] / difference).item()
        self.a = (x0[0] - self.b * noise[0]).flatten()[0].item()

    def forward(self, x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        t = (time.double() + 1) / self.schedule.num_train_timesteps
        alpha, sigma = self.schedule.at(t, like=x_t)
        alpha_1, sigma_1 = self.schedule.numbers(1.0)
        # x_t = alpha x0 + sigma (noise - alpha_1 x0) / sigma_1, and x0 = a + b noise
        along = alpha - sigma * alpha_1 / sigma_1
        noise = (x_t - along * self.a) / (along * self.b + sigma / sigma_1)
        return self.a + self.b * noise + self.bias


def straight(schedule: Schedule, bias: float = 0.0) -> Denoiser:
    return Denoiser(Straight(schedule, bias), schedule, "sample", shape=(1, 4, 4))


def losses(method: Reflow, net: Denoiser, noise: torch.Tensor, x0: torch.Tensor, seed: int = 0):
    """Of both stages."""
    for stage in method.stages(net):
        rng = torch.Generator().manual_seed(seed)
        (loss,) = method.losses({"student": net}, Batch(x0, {}, noise), Step(stage, 0), rng)
        yield loss


def test_one_step_by_hand():
    """Both stages, with the schedule's own table and numpy: in flow coordinates, as the paper has it."""
    net, method = student(None, "v_prediction", COSINE), Reflow(steps=[8, 2])
    net.network.double()
    noise, x0 = drawn(COSINE, 5, size=8)
    alpha, sigma = (np.sqrt(v) for v in (COSINE.alphas_cumprod.numpy(), 1 - COSINE.alphas_cumprod.numpy()))
    whole, last = losses(method, net, noise, x0, seed=3)
    rng = torch.Generator().manual_seed(3)
    first = sigma[0] / (alpha[0] + sigma[0])
    tau = 1 - torch.rand(5, generator=rng, dtype=torch.float64).numpy() * (1 - first)
    rng = torch.Generator().manual_seed(3)
    nodes = torch.randint(1, 3, (5,), generator=rng).numpy() * 32 - 1
    for loss, levels in ((whole, tau), (last, sigma[nodes] / (alpha[nodes] + sigma[nodes]))):
        tau_ = levels[:, None, None, None]
        z = (1 - tau_) * x0.numpy() + tau_ * noise.numpy()
        a, s = (1 - tau_) / np.hypot(1 - tau_, tau_), tau_ / np.hypot(1 - tau_, tau_)
        x_t, t = torch.from_numpy(z * (a + s)), flow.time_at(COSINE, torch.from_numpy(levels))
        with torch.no_grad():
            v = net.network(x_t, (t * 64 - 1).float().double()).sample.numpy()
        found = (a * v + s * x_t.numpy()) - (a * x_t.numpy() - s * v)
        expected = ((found - (noise - x0).numpy()) ** 2).reshape(5, -1).mean(1)
        assert loss.metrics["loss"].numpy() == pytest.approx(expected, rel=1e-6)
        assert loss.metrics["t"].numpy() == pytest.approx(t.numpy(), abs=1e-12)


@pytest.mark.parametrize("schedule", [COSINE, LINEAR], ids=["cosine", "linear"])
def test_a_line_runs_from_the_image_to_the_noise_itself(schedule):
    noise, x0 = drawn(schedule, 6)
    x_1, _ = line(schedule, x0, noise, torch.ones(6, dtype=torch.float64))
    assert torch.allclose(x_1, noise, atol=1e-12)
    x_0, eps = line(schedule, x0, noise, torch.zeros(6, dtype=torch.float64))
    assert torch.allclose(x_0, x0, atol=1e-12)
    t = torch.linspace(0.05, 1, 6, dtype=torch.float64)
    x_t, _ = line(schedule, x0, noise, t)
    tau = flow.flow_time(schedule, t)[:, None, None, None]
    assert torch.allclose(x_t / flow.scale(schedule, t, x_t), x0 + tau * (eps - x0), atol=1e-12)


@pytest.mark.parametrize("schedule", [COSINE, LINEAR], ids=["cosine", "linear"])
def test_the_straight_flow_has_no_loss_and_others_have(schedule):
    noise, x0 = drawn(schedule, 16)
    method, other = Reflow(steps=[4, 2]), straight(schedule, bias=0.1)
    exact = [loss.value.item() for loss in losses(method, straight(schedule), noise, x0)]
    assert max(exact) < 1e-9
    for loss in losses(method, other, noise, x0):
        assert loss.value > 0.0099  # the error in x0 is 0.1, and that of the velocity larger
        (gradient,) = torch.autograd.grad(loss.value, other.network.bias)
        assert gradient > 0


def test_a_straight_flow_draws_the_same_in_any_number_of_steps():
    """The teacher's images of the same noise; the teacher itself is far from them in few steps."""
    noise, x0 = drawn(COSINE, 8)
    with torch.no_grad():
        for steps in (1, 2, 4, 8):
            assert torch.allclose(samplers.sample(straight(COSINE), noise, steps), x0, atol=1e-9)
            assert (samplers.sample(gaussian(COSINE), noise, steps) - x0).abs().max() > 0.02


class Affine(nn.Module):
    """A velocity a(tau) z + b(tau), two polynomials that begin as 0 and are learned."""

    def __init__(self, degree: int = 9) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(2, degree + 1, dtype=torch.float64))

    def forward(self, x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        t = (time.double() + 1) / COSINE.num_train_timesteps
        tau = flow.flow_time(COSINE, t)
        angle = torch.acos((2 * tau - 1).clamp(-1, 1))[:, None]
        waves = torch.cos(angle * torch.arange(self.weights.shape[1]))  # Chebyshev's polynomials of tau
        a, b = (waves @ w for w in self.weights)
        return a.reshape(-1, 1, 1, 1) * x_t / flow.scale(COSINE, t, x_t) + b.reshape(-1, 1, 1, 1)


def learned(noise: torch.Tensor, x0: torch.Tensor) -> Denoiser:
    """What the first stage's loss on these pairs makes of such a velocity: a square in its weights, whose
    least is one step of Newton's."""
    net = Denoiser(Affine(), COSINE, "flow", shape=(1, 2, 2))
    weights = net.network.weights
    loss, _ = losses(Reflow(steps=[8, 1]), net, noise, x0)
    (gradient,) = torch.autograd.grad(loss.value, weights, create_graph=True)
    rows = [torch.autograd.grad(g, weights, retain_graph=True)[0].flatten() for g in gradient.flatten()]
    step = torch.linalg.solve(torch.stack(rows), gradient.detach().flatten())
    weights.data -= step.reshape(weights.shape)
    return net


@torch.no_grad()
def followed(net: Denoiser, noise: torch.Tensor, steps: int = 64) -> tuple[torch.Tensor, float]:
    """The images of a flow, and how far it is from straight: the mean over its time of |v - (x_1 - x_0)|^2
    (Liu et al. 2022, section 3.2)."""
    x, parts = noise, []
    for t, s in pairwise(samplers.grid(steps)):
        length = np.subtract(*flow.flow_time(COSINE, torch.tensor([t, s]).double()).numpy())
        parts.append((length, flow.velocity(net.predict(x, t))))
        x = samplers.ddim(net, x, [t, s])
    return x, sum(length * (v - (noise - x)).square().mean().item() for length, v in parts)


def test_marginals_stay_the_cost_of_transport_falls_and_the_second_flow_is_straight():
    """Liu et al. 2022, sections 3.1 and 3.2, by the method's own loss: of noises and images that have nothing
    to do with each other, and then of the pairs that this flow draws."""
    noise, x0 = drawn(COSINE, 8192, size=2)
    fresh, _ = drawn(COSINE, 2000, size=2, seed=2)
    apart = x0.flip(0)
    first = learned(noise, apart)
    costs, bends, errors = [(noise - apart).square().mean().item()], [], []
    for net in (first, learned(noise, followed(first, noise)[0])):
        images, bend = followed(net, fresh)
        assert images.mean().item() == pytest.approx(MEAN, abs=0.03)
        assert images.std().item() == pytest.approx(STD, abs=0.02)
        with torch.no_grad():
            in_one = samplers.sample(net, fresh, 1)
        costs.append((fresh - images).square().mean().item())
        errors.append((in_one - images).square().mean().sqrt().item())
        bends.append(bend)
    assert costs[0] == pytest.approx(MEAN**2 + 1 + STD**2, rel=0.03)
    assert costs[1:] == pytest.approx([MEAN**2 + (1 - STD) ** 2] * 2, rel=0.1)
    assert bends[0] > 0.15 and bends[1] < 1e-6 * bends[0]
    assert errors[0] > 0.4 and errors[1] < 1e-3 * errors[0]


def test_an_affine_flow_learns_to_be_straight():
    """Of one parameter a time, by the method's own losses: one step then draws what the teacher draws."""
    net, method = straight(COSINE, bias=0.5), Reflow(steps=[4, 1])
    noise, x0 = drawn(COSINE, 64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    for update in range(60):
        _, last = losses(method, net, noise, x0, seed=update)
        optimizer.zero_grad()
        last.value.backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.allclose(samplers.sample(net, noise, 1), x0, atol=1e-6)


def test_its_stages():
    """The straight flow for all step counts but the last, then the last from pairs of that flow."""
    method = Reflow(steps=[16, 4, 2, 1], pairs=9, pair_steps=5, sampler="heun", guidance=1.0)
    whole, last = method.stages(gaussian(COSINE, "v_prediction"))
    assert [one.name for one in whole.students] == ["4-steps", "2-steps", "16-steps"]
    assert (whole.teacher, whole.pairs, whole.prediction) == ("original", Pairs(9, 5, "heun"), None)
    assert (last.name, last.teacher, last.pairs) == ("1-steps", "previous", Pairs(9, 16, "ddim"))
    assert len(Reflow(steps=[4]).stages(gaussian(COSINE))) == 1
    assert Reflow(steps=[4]).stages(gaussian(LINEAR, "epsilon"))[0].prediction == "v_prediction"


def test_what_does_not_fit():
    with pytest.raises(ValidationError, match="do not decrease"):
        Reflow(steps=[2, 4])
    with pytest.raises(UserError, match="3 steps does not fit a teacher of 64"):
        Reflow(steps=[3, 1]).stages(gaussian(COSINE))
    with pytest.raises(UserError, match="guidance needs a label"):
        Reflow(guidance=2).stages(gaussian(COSINE))
