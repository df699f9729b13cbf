"""Schedules as straight flows: round trips, DDIM as Euler's step, rates against closed forms."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from diffkd.core import flow, samplers
from diffkd.core.denoiser import Predicted
from diffkd.core.schedules import Schedule, from_diffusers
from diffkd.errors import UserError
from tests.gaussian import gaussian

SCHEDULES = {
    "cosine": Schedule.cosine(1024),
    "linear": from_diffusers(DDPMScheduler()),
    "zero-snr": from_diffusers(DDPMScheduler(rescale_betas_zero_snr=True)),
}


@pytest.fixture(params=SCHEDULES, scope="module")
def schedule(request):
    return SCHEDULES[request.param]


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_flow_times_go_to_t_and_back(schedule):
    t = torch.cat([random(200), torch.tensor([0.0, 1e-4, 0.5, 1.0]).double()])
    tau = flow.flow_time(schedule, t)
    assert (tau[t.argsort()].diff() > 0).all() and tau[-4] == 0
    assert (tau[-1] == 1) == schedule.zero_terminal_snr
    assert torch.allclose(flow.time_at(schedule, tau), t, rtol=0, atol=1e-9)


def test_states_and_predictions_are_those_of_a_straight_path(schedule):
    """z = (1 - tau) x0 + tau eps, whose derivative is eps - x0."""
    x0, eps, t = normal(4, 1, 3, 3), normal(4, 1, 3, 3, seed=1), torch.tensor([0.2, 0.5, 0.9, 1.0]).double()
    alpha, sigma = schedule.at(t, like=x0)
    z = (alpha * x0 + sigma * eps) / flow.scale(schedule, t, like=x0)
    tau = flow.flow_time(schedule, t).reshape(-1, 1, 1, 1)
    assert torch.allclose(z, (1 - tau) * x0 + tau * eps, atol=1e-12)
    assert torch.equal(flow.velocity(Predicted(x0, eps)), eps - x0)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample", "flow"])
def test_a_ddim_step_is_an_euler_step(schedule, prediction):
    denoiser = gaussian(schedule, prediction)
    x, t, s = normal(4, 1, 4, 4), torch.tensor([0.3, 0.7, 1.0, 1.0]).double(), torch.tensor([0, 0.4, 0.5, 0])
    s = s.double()
    x_s = samplers.ddim(denoiser, x, torch.stack([t, s]))
    z = x / flow.scale(schedule, t, like=x)
    step = (flow.flow_time(schedule, t) - flow.flow_time(schedule, s)).reshape(-1, 1, 1, 1)
    z = z - step * flow.velocity(denoiser.predict(x, t))
    assert torch.allclose(z * flow.scale(schedule, s, like=x), x_s, atol=1e-12)


def test_rates_are_derivatives(schedule):
    """By automatic differentiation between the nodes; on a variance-preserving schedule along the circle."""
    t = random(100) * 0.999 + 5e-4
    like = torch.zeros(1, dtype=torch.float64)
    exact = torch.func.jvp(lambda t: torch.stack(schedule.at(t)), (t,), (torch.ones_like(t),))[1]
    found = torch.stack(flow.rates(schedule, t, like))
    inside = ((t * schedule.num_train_timesteps) % 1 - 0.5).abs() < 0.45  # no kink within the difference
    assert inside.sum() > 70 and torch.allclose(found[:, inside], exact[:, inside], rtol=1e-4, atol=1e-7)
    alpha, sigma = schedule.at(t)
    assert (alpha * found[0] + sigma * found[1]).abs().max() < 1e-4


def test_rates_at_nodes_and_at_the_end_of_the_cosine_schedule():
    """There the table has no derivative of its own: it is close to that of cos(pi t / 2), and in the last
    cell alpha / sigma is linear."""
    schedule = Schedule.cosine(4096)
    t = torch.tensor([0.25, 0.5, 0.75, 1.0]).double()
    d_alpha, d_sigma = flow.rates(schedule, t, torch.zeros(1, dtype=torch.float64))
    angle = math.pi / 2 * t
    assert torch.allclose(d_alpha[:3], -math.pi / 2 * angle[:3].sin(), atol=0.02)
    assert torch.allclose(d_sigma, math.pi / 2 * angle.cos(), atol=0.02)
    before = schedule.alphas_cumprod[-2]
    assert d_alpha[3].item() == pytest.approx(-4096 * (before / (1 - before)).sqrt().item(), rel=1e-6)


def test_rates_are_shaped_to_multiply_a_state(schedule):
    like = torch.zeros(3, 1, 2, 2)
    for rate in flow.rates(schedule, random(3), like):
        assert rate.shape == (3, 1, 1, 1) and rate.dtype == torch.float32


def test_what_cannot_become_a_velocity_is_refused():
    linear = SCHEDULES["linear"]
    flow.check_start(gaussian(linear, "v_prediction"), [1, 2, 500])
    with pytest.raises(UserError, match="x0 at t = 1 is its output times 157.*put .name: output"):
        flow.check_start(gaussian(linear, "epsilon"), [1])
    with pytest.raises(UserError, match="a student of 3 steps does not fit"):
        flow.check_start(gaussian(linear), [1, 3])
    with pytest.raises(UserError, match="guidance needs a label"):
        flow.check_start(gaussian(linear), [1], 1.5)
