"""EDM's schedule: closed forms, the stock scheduler's grid, preconditioning and steps."""

import math

import pytest
import torch
from diffusers import EDMEulerScheduler
from torch import nn

from diffkd.core import samplers
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import EDMSchedule, Preconditioned, from_diffusers
from diffkd.errors import UserError

SCHEDULES = {
    "default": EDMSchedule(),
    "small": EDMSchedule(0.01, 20.0, 5.0, 0.8, 12),
    "two": EDMSchedule(num_train_timesteps=2),
}


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


def test_the_law_of_sigma(schedule):
    """Karras et al. 2022, equation 5, at i / T; sigma is linear from 0 to the first of them."""
    total, rho = schedule.num_train_timesteps, schedule.rho
    i = torch.arange(total, 0, -1, dtype=torch.float64)
    ends = schedule.sigma_max ** (1 / rho), schedule.sigma_min ** (1 / rho)
    expected = (ends[0] + (total - i) / (total - 1) * (ends[1] - ends[0])) ** rho
    alpha, sigma = schedule.at(i / total)
    assert torch.allclose(sigma, expected, rtol=1e-12) and (alpha == 1).all()
    assert sigma[0].item() == pytest.approx(schedule.sigma_max, rel=1e-12)
    below = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    assert torch.allclose(schedule.at(below / total)[1], below * schedule.sigma_min, rtol=1e-9)
    dense = schedule.at(torch.linspace(0, 1, 5001, dtype=torch.float64))[1]
    assert (dense.diff() > 0).all() and not schedule.zero_terminal_snr


def test_a_time_is_found_by_its_log_snr(schedule):
    t = torch.rand(300, dtype=torch.float64)
    t = torch.cat([t, t / schedule.num_train_timesteps, torch.tensor([0.0, 1.0]).double()])
    assert (schedule.time_of(schedule.half_log_snr(t)) - t).abs().max() < 1e-10
    assert torch.allclose(schedule.half_log_snr(t[:-2]), schedule.snr(t[:-2]).log() / 2, atol=1e-10)
    beyond = torch.tensor([math.inf, -math.log(schedule.sigma_max) - 1, -math.inf], dtype=torch.float64)
    assert schedule.time_of(beyond).tolist() == [0.0, 1.0, 1.0]


def test_networks_are_given_sigma(schedule):
    t = torch.rand(100, dtype=torch.float64)
    time = schedule.network_time(t, t)
    assert torch.equal(time, schedule.at(t)[1].float())
    assert (schedule.of_network_time(time) - t).abs().max() < 1e-5
    assert (
        schedule.network_time(0.5, torch.empty(3)).tolist() == [schedule.numbers(0.5, torch.float32)[1]] * 3
    )


@pytest.mark.parametrize("steps", [1, 2, 5, 18])
def test_the_stock_schedulers_own_grid_on_request(steps):
    stock = EDMEulerScheduler(sigma_min=0.01, sigma_max=60.0, rho=6.0)
    schedule = from_diffusers(stock, steps=steps)
    stock.set_timesteps(steps)
    sigma = schedule.at(torch.tensor(samplers.grid(steps)).double(), like=torch.empty(1))[1]
    assert torch.allclose(sigma, stock.sigmas, rtol=3e-7, atol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_preconditioning_is_the_stock_schedulers(prediction):
    stock = EDMEulerScheduler(sigma_data=0.7, prediction_type=prediction)
    schedule = from_diffusers(stock)
    sigma = torch.rand(6) * 20 + 0.01
    x, output = torch.randn(2, 6, 1, 3, 3)
    seen = {}

    def network(x_in, c_noise):
        seen.update(x_in=x_in, c_noise=c_noise)
        return output

    x0 = Preconditioned(schedule, negated=prediction == "v_prediction")(network, x, sigma, {})
    wide = sigma.reshape(-1, 1, 1, 1)
    assert torch.allclose(seen["x_in"], stock.precondition_inputs(x, wide), rtol=1e-6)
    assert torch.equal(seen["c_noise"], stock.precondition_noise(sigma))
    assert torch.allclose(x0, stock.precondition_outputs(x, output, wide), rtol=1e-5, atol=1e-6)


def test_preconditioned_gaussian_data():
    """Equations 112 to 131: c_in x has unit variance; the F that makes D exact has it too where data has
    sigma_data, and is 0 if the data is Gaussian of just that width."""
    schedule = EDMSchedule()
    sigma = torch.rand(50, dtype=torch.float64) * 10 + 1e-3
    c_skip, c_out, c_in, _ = schedule.preconditioning(sigma)
    data = schedule.sigma_data**2
    assert torch.allclose(c_in**2 * (data + sigma**2), torch.ones(50).double())
    assert torch.allclose(c_out**2, (1 - c_skip) ** 2 * data + c_skip**2 * sigma**2)
    assert torch.allclose(c_skip, data / (data + sigma**2))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: torch.Tensor, c_noise: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.tanh(self.scale * x) * (1 + c_noise.reshape(-1, 1, 1, 1)),)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 5, 18])
@torch.no_grad()
def test_ddim_is_the_stock_euler(steps, prediction):
    stock = EDMEulerScheduler(prediction_type=prediction)
    schedule = from_diffusers(stock, steps=steps)
    call = Preconditioned(schedule, negated=prediction == "v_prediction")
    denoiser = Denoiser(Network(), schedule, "sample", call=call)
    noise = torch.randn(3, 1, 4, 4)
    stock.set_timesteps(steps)
    x = first = noise * stock.init_noise_sigma
    for time in stock.timesteps:
        output = denoiser.network(stock.scale_model_input(x, time), time.expand(len(x)))[0]
        x = stock.step(output, time, x).prev_sample
    rounding = (
        torch.finfo(torch.float32).eps * first.abs().max()
    )  # the stock step subtracts states of this size
    assert (samplers.sample(denoiser, noise, steps) - x).abs().max() < 3 * rounding


def test_noise_is_scaled_once():
    schedule, noise = EDMSchedule(sigma_max=3.0), torch.randn(2, 1, 2, 2, dtype=torch.float64)
    assert torch.allclose(schedule.from_noise(noise), noise * 10**0.5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: EDMSchedule(0.0), "no EDM schedule; use 0 < sigma_min < sigma_max"),
        (lambda: EDMSchedule(3.0, 2.0), "sigma 3.0 to 2.0"),
        (lambda: EDMSchedule(rho=0.0), "rho 0.0"),
        (lambda: EDMSchedule(sigma_data=math.inf), "sigma_data inf"),
        (lambda: EDMSchedule(num_train_timesteps=1), "1 time steps make no EDM schedule"),
        (lambda: EDMSchedule().check_steps(0), "0 steps does not fit a schedule of 1000"),
        (lambda: EDMSchedule(num_train_timesteps=18).check_steps(19), "use 1 to 18"),
        (lambda: Denoiser(Network(), EDMSchedule(), "v_prediction"), "v_prediction does not give x0"),
    ],
)
def test_bad_values(make, says):
    with pytest.raises(UserError, match=says):
        make()
