"""The path of consistency models: the stock scheduler's grid, times, preconditioning and steps."""

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler

from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import ConsistencySchedule, EDMSchedule, from_diffusers, prediction_of
from diffkd.errors import UserError

SCHEDULES = {
    "default": {},
    "small": {"num_train_timesteps": 12, "sigma_min": 0.05, "sigma_max": 20.0, "rho": 5.0, "sigma_data": 0.8},
    "two": {"num_train_timesteps": 2},
}


@pytest.fixture(params=SCHEDULES)
def stock(request):
    return CMStochasticIterativeScheduler(**SCHEDULES[request.param])


def test_an_even_grid_is_the_stock_schedulers(stock):
    """Its times and levels, and the width of what is added to x0 at sigma_min."""
    schedule, total = from_diffusers(stock), stock.config.num_train_timesteps
    assert prediction_of(stock) == "sample" and schedule.num_train_timesteps == total
    for steps in (n for n in range(1, total) if total % n == 0):
        stock.set_timesteps(steps)
        for i in range(steps):
            t = 1 - i / steps
            sigma = stock.sigmas[i].double()
            width = (sigma**2 - stock.config.sigma_min**2).sqrt()
            assert schedule.numbers(t) == (1.0, pytest.approx(width.item(), rel=1e-4))
            given = schedule.network_time(t, torch.empty(2))
            assert torch.allclose(given.double(), stock.timesteps[i].expand(2), rtol=1e-6, atol=1e-4)
            tensor = schedule.network_time(torch.tensor([t]).double(), torch.empty(1))
            assert torch.allclose(tensor, given[:1], rtol=1e-6, atol=1e-4)


def test_a_time_is_found_by_its_log_snr_and_by_the_networks_time(stock):
    schedule = from_diffusers(stock)
    t = torch.rand(300, dtype=torch.float64)
    t = torch.cat([t, t / schedule.num_train_timesteps, torch.tensor([0.0, 1.0]).double()])
    assert (schedule.time_of(schedule.half_log_snr(t)) - t).abs().max() < 1e-10
    inside = t[
        t >= min(1, 3 / schedule.num_train_timesteps)
    ]  # below, the level hardly moves the time in float32
    assert (schedule.of_network_time(schedule.network_time(inside, inside)) - inside).abs().max() < 1e-4
    levels = schedule.at(torch.linspace(0, 1, 5001, dtype=torch.float64))[1]
    assert levels[0] == 0 and (levels.diff() > 0).all()


def test_preconditioning_is_the_stock_schedulers(stock):
    schedule = from_diffusers(stock)
    t = torch.tensor([0.5, 0.75, 1.0], dtype=torch.float64)
    time = schedule.network_time(t, t)
    sigma = (time / 250).exp()
    c_skip, c_out, c_in, c_noise = schedule.preconditioning(time)
    for own, theirs in zip((c_skip, c_out), stock.get_scalings_for_boundary_condition(sigma), strict=True):
        assert torch.allclose(own, theirs, rtol=1e-6)
    assert torch.allclose(c_in, 1 / (sigma**2 + stock.config.sigma_data**2).sqrt()) and c_noise is time
    assert schedule.width == stock.config.sigma_data


def test_an_image_at_the_least_level_is_its_own():
    schedule = ConsistencySchedule()
    time = torch.tensor([250 * torch.tensor(0.002).log()])
    c_skip, c_out, _, _ = schedule.preconditioning(time)
    assert c_skip.item() == pytest.approx(1) and abs(c_out.item()) < 1e-8


def test_noise_is_scaled_to_the_widest_level():
    noise = torch.randn(2, 1, 2, 2)
    assert torch.equal(ConsistencySchedule(EDMSchedule(sigma_max=3.0)).from_noise(noise), noise * 3)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ConsistencySchedule().check_steps(40, "renoise"), "use one of 1, 2, 4, 5, 8, 10, 20"),
        (lambda: ConsistencySchedule().check_steps(3, "renoise"), "3 steps does not fit a consistency model"),
        (lambda: ConsistencySchedule().check_steps(2), "its stock scheduler draws by renoise alone"),
        (lambda: Denoiser(torch.nn.Identity(), ConsistencySchedule(), "v_prediction"), "does not give x0"),
        (lambda: EDMSchedule().check_steps(2, "renoise"), "2 steps drawn by renoise does not fit an EDM"),
        (lambda: EDMSchedule().extended(1001), "not the last level of 1001 steps"),
        (lambda: EDMSchedule().extended(2), "sigma_min 0.002 is not the last level of 2 steps"),
    ],
)
def test_bad_values(make, says):
    with pytest.raises(UserError, match=says):
        make()
    for steps in (1, 2, 20):
        ConsistencySchedule().check_steps(steps, "renoise")
        EDMSchedule().check_steps(steps)
    ConsistencySchedule().check_steps(1)


@pytest.mark.parametrize("steps", [1, 2, 4, 18, 1000])
def test_the_grid_that_a_stock_scheduler_is_told(steps):
    """Shortened to it, its own grid is the even one of the long schedule; extended again, it is the same."""
    schedule = EDMSchedule(0.01, 50.0, 6.0, num_train_timesteps=1000)
    short = schedule.shortened(steps)
    alone = EDMSchedule(short.sigma_min, 50.0, 6.0, num_train_timesteps=max(steps, 2))
    for i in range(steps):
        assert schedule.numbers(1 - i / steps)[1] == pytest.approx(alone.numbers(1 - i / steps)[1], rel=1e-9)
    assert short.extended(steps).sigma_min == pytest.approx(schedule.sigma_min, rel=1e-9)
