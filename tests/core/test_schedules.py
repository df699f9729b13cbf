import math

import diffusers
import numpy as np
import pytest
import torch

from diffkd.core.schedules import (
    PREDICTIONS,
    Schedule,
    from_betas,
    from_diffusers,
    read_prediction,
    to_diffusers,
    write_prediction,
)
from diffkd.errors import UserError

LINEAR = diffusers.DDPMScheduler(num_train_timesteps=1000)
SCHEDULERS = {
    "linear": LINEAR,
    "scaled": diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "zero": diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True),
    "trained": diffusers.DDIMScheduler(trained_betas=np.linspace(1e-3, 0.2, 40)),
    "trained-zero": diffusers.DDIMScheduler(
        num_train_timesteps=40, trained_betas=list(np.linspace(1e-3, 0.2, 40)), rescale_betas_zero_snr=True
    ),
    "sigmoid": diffusers.DDPMScheduler(beta_schedule="sigmoid"),
    "dpm": diffusers.DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_coefficients_are_those_of_the_scheduler(name):
    scheduler = SCHEDULERS[name]
    schedule = from_diffusers(scheduler)
    t = (torch.arange(schedule.num_train_timesteps).double() + 1) / schedule.num_train_timesteps
    alpha, sigma = schedule.at(t)
    expected = scheduler.alphas_cumprod.double()
    assert (alpha**2 - expected).abs().max() < 1e-7
    assert (alpha**2 + sigma**2 - 1).abs().max() < 1e-15
    # in float32 they are the stock DDIM step's own, bit by bit
    stock = to_diffusers(schedule, "v_prediction").alphas_cumprod
    alpha, sigma = schedule.at(t, like=torch.empty(1))
    assert torch.equal(alpha, stock**0.5) and torch.equal(sigma, (1 - stock) ** 0.5)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_time_is_found_by_its_log_snr(name):
    """The inverse of half_log_snr, at nodes, between them and in both end cells; beyond the table the end."""
    schedule = from_diffusers(SCHEDULERS[name])
    count = schedule.num_train_timesteps
    t = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.cat([t, t / count, 1 - t / count, torch.arange(count + 1).double() / count])
    found = schedule.time_of(schedule.half_log_snr(t))
    assert found.dtype == torch.float64 and (found - t).abs().max() < 1e-9
    end = schedule.half_log_snr(torch.ones(1).double()).item()
    beyond = torch.tensor([math.inf, 1e4, end - 1, -math.inf]).double()
    expected = torch.tensor([0.0, 0.0, 1.0, 1.0]).double()
    if not schedule.zero_terminal_snr:
        assert torch.allclose(schedule.time_of(beyond), expected, atol=1e-12)
    slope = torch.func.jvp(schedule.time_of, (schedule.half_log_snr(t[:500]),), (torch.ones(500).double(),))[
        1
    ]
    assert (slope < 0).all()


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("prediction", PREDICTIONS[:3])
def test_round_trip_through_a_saved_scheduler(name, prediction, tmp_path):
    schedule = from_diffusers(SCHEDULERS[name])
    stock = to_diffusers(schedule, prediction, clip=2.0)
    stock.save_pretrained(tmp_path)
    again = from_diffusers(diffusers.DDIMScheduler.from_pretrained(tmp_path))
    assert torch.equal(again.alphas_cumprod, schedule.alphas_cumprod)
    config = diffusers.DDIMScheduler.from_pretrained(tmp_path).config
    assert config.prediction_type == prediction and config.timestep_spacing == "trailing"
    assert config.set_alpha_to_one and config.clip_sample and config.clip_sample_range == 2.0


def test_cosine_is_the_cosine():
    """Nichol & Dhariwal 2021, equation 17, but for the rescaling of the last steps."""
    schedule = Schedule.cosine(1024)
    t = torch.linspace(0.05, 0.9, 50, dtype=torch.float64)
    t = (t * 1024).round() / 1024
    alpha, _ = schedule.at(t)

    def f(u):
        return torch.cos((u + 0.008) / 1.008 * math.pi / 2)

    assert (alpha - f(t) / f(torch.zeros(1))).abs().max() < 2e-3
    assert schedule.zero_terminal_snr and not from_diffusers(LINEAR).zero_terminal_snr


@pytest.mark.parametrize("name", SCHEDULERS)
def test_between_nodes(name):
    """Continuous at the nodes, monotone, log-SNR linear inside, exact at both ends."""
    schedule = from_diffusers(SCHEDULERS[name])
    total = schedule.num_train_timesteps
    t = torch.linspace(0, 1, 40 * total + 1, dtype=torch.float64)
    alpha, sigma = schedule.at(t)
    assert alpha[0] == 1 and sigma[0] == 0 and sigma[-1] == schedule.at(torch.ones(1))[1]
    assert (alpha.diff() <= 0).all() and (sigma.diff() >= 0).all()
    assert (alpha**2 + sigma**2 - 1).abs().max() < 1e-14
    nodes = torch.arange(1, total) / total
    for shift in (-1e-9, 1e-9):
        near = torch.stack(schedule.at(nodes + shift * 10 / total))
        assert (near - torch.stack(schedule.at(nodes))).abs().max() < 1e-6
    k = total // 3
    lambdas = schedule.half_log_snr(torch.tensor([k, k + 0.25, k + 1], dtype=torch.float64) / total)
    assert abs(lambdas[1] - (0.75 * lambdas[0] + 0.25 * lambdas[2])) < 1e-12


def test_near_data_sigma_is_linear_and_near_noise_alpha_is():
    schedule = Schedule.cosine(64)
    t = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64) / 64
    alpha, sigma = schedule.at(t)
    ratio = sigma / alpha
    assert torch.allclose(ratio / ratio[-1], torch.tensor([0.25, 0.5, 1.0]).double(), rtol=1e-12)
    alpha, sigma = schedule.at(1 - t)
    ratio = alpha / sigma
    assert torch.allclose(ratio / ratio[-1], torch.tensor([0.25, 0.5, 1.0]).double(), rtol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predictions_read_and_written(prediction):
    """x0 and eps explain x_t, and writing inverts reading, in float64 to rounding."""
    generator = torch.Generator().manual_seed(7)
    x0, eps = torch.randn(2, 6, 3, 4, 4, generator=generator, dtype=torch.float64)
    alpha, sigma = (
        v.reshape(-1, 1, 1, 1) for v in Schedule.cosine(64).at(torch.rand(6).double() * 0.9 + 0.05)
    )
    x_t = alpha * x0 + sigma * eps
    output = write_prediction(prediction, x_t, x0, alpha, sigma)
    defined = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0, "flow": eps - x0}
    assert torch.allclose(output, defined[prediction], atol=1e-10)
    read = read_prediction(prediction, x_t, output, alpha, sigma)
    assert torch.allclose(read[0], x0, atol=1e-10) and torch.allclose(read[1], eps, atol=1e-10)


def test_network_time_is_the_tables_index():
    time = Schedule.cosine(1024).network_time(t := torch.tensor([1 / 1024, 0.5, 1.0, 1.5 / 1024]), t)
    assert time.tolist() == [0.0, 511.0, 1023.0, 0.5] and time.dtype == torch.float32


@pytest.mark.parametrize(
    ("total", "steps", "fits"), [(1000, 6, False), (1000, 40, True), (1024, 32, True), (1024, 0, False)]
)
def test_valid_steps(total, steps, fits):
    schedule = Schedule.cosine(total)
    if fits:
        schedule.check_steps(steps)
    else:
        with pytest.raises(UserError, match="1, 2, 4, "):
            schedule.check_steps(steps)


def test_the_stock_scheduler_drifts_where_steps_do_not_divide():
    """Why such step counts are refused: its previous index is t - T // N, not its own next one."""
    stock = to_diffusers(Schedule.cosine(1000), "v_prediction")
    stock.set_timesteps(6)
    assert (stock.timesteps[:-1] - 1000 // 6 != stock.timesteps[1:]).any()
    stock.set_timesteps(8)
    assert torch.equal(stock.timesteps[:-1] - 1000 // 8, stock.timesteps[1:])


def test_the_default_spacing_does_not_start_at_noise():
    """`leading`, diffusers' default, starts a 4-step student at 3/4 noise."""
    stock = diffusers.DDIMScheduler.from_config(to_diffusers(Schedule.cosine(1000), "v_prediction").config)
    stock.set_timesteps(4)
    assert stock.timesteps[0] == 999
    leading = diffusers.DDIMScheduler(num_train_timesteps=1000)
    leading.set_timesteps(4)
    assert leading.timesteps[0] == 750


def test_a_scheduler_without_betas_is_refused():
    with pytest.raises(UserError, match="has no betas, and is not supported; supported are"):
        from_betas(diffusers.FlowMatchEulerDiscreteScheduler())


def test_flow_has_no_stock_ddim():
    with pytest.raises(UserError, match="flow"):
        to_diffusers(Schedule.cosine(64), "flow")
