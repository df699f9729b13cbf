import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import nn

from diffkd.core import samplers
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import (
    BetaSchedule,
    EDMSchedule,
    FlowSchedule,
    Schedule,
    Shift,
    from_diffusers,
    to_diffusers,
)
from diffkd.errors import UserError
from tests.gaussian import flow, gaussian, marginal

COSINE = Schedule.cosine(1024)
LINEAR = from_diffusers(DDPMScheduler())
PATHS = {  # and a prediction type of each
    "cosine": (COSINE, "sample"), "linear": (LINEAR, "sample"), "flow": (FlowSchedule(), "flow"),
    "shifted": (FlowSchedule(Shift(3.0)), "flow"), "edm": (EDMSchedule(), "sample"),
}  # fmt: skip
CASES = [
    (LINEAR, "epsilon"),
    (LINEAR, "v_prediction"),
    (LINEAR, "sample"),
    (COSINE, "v_prediction"),
    (COSINE, "sample"),
]


def stock_images(scheduler, denoiser, noise, steps, **options):
    """The stock loop: network on the integer timestep, then scheduler.step."""
    scheduler.set_timesteps(steps)
    x = noise
    for step in scheduler.timesteps:
        with torch.no_grad():
            output = denoiser.network(x.to(denoiser.dtype), step.expand(len(x))).to(x.dtype)
        x = scheduler.step(output, step, x, **options).prev_sample
    return x


@pytest.mark.parametrize("steps", [1, 2, 8, 40])
@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize(("schedule", "prediction"), CASES)
def test_ddim_is_diffusers_ddim_bit_for_bit(schedule, prediction, clip, steps):
    if schedule.num_train_timesteps % steps:
        steps = 32
    denoiser = gaussian(schedule, prediction)
    denoiser.clip = clip
    noise = torch.randn(5, 1, 4, 4)
    ours = samplers.sample(denoiser, noise, steps)
    stock = stock_images(to_diffusers(schedule, prediction, clip), denoiser, noise, steps)
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize(("schedule", "prediction"), CASES)
def test_ancestral_is_diffusers_ddim_with_eta(schedule, prediction, eta):
    denoiser = gaussian(schedule, prediction)
    noise = torch.randn(3, 1, 4, 4)
    ours = samplers.sample(denoiser, noise, 8, "ancestral", eta=eta, generator=[_seeded(i) for i in range(3)])
    scheduler = to_diffusers(schedule, prediction)
    stock = stock_images(scheduler, denoiser, noise, 8, eta=eta, generator=[_seeded(i) for i in range(3)])
    assert (ours - stock).abs().max() < 2e-5


@pytest.mark.parametrize("steps", [2, 5, 20])
@pytest.mark.parametrize(("schedule", "prediction"), CASES)
def test_dpmpp_2m_is_diffusers_dpm_solver(schedule, prediction, steps):
    """The same grid (trailing), midpoint, ending in one first-order step."""
    if (
        schedule.zero_terminal_snr
    ):  # diffusers' solver cannot start at alpha = 0 and takes 2^-12, so here we do too
        steps = {2: 2, 5: 4, 20: 32}[steps]
        schedule = BetaSchedule(
            torch.cat([schedule.alphas_cumprod[:-1], torch.tensor([2.0**-24])]), schedule.betas
        )
    scheduler = DPMSolverMultistepScheduler(
        **schedule.betas, prediction_type=prediction, timestep_spacing="trailing",
        algorithm_type="dpmsolver++",
        solver_type="midpoint", solver_order=2, final_sigmas_type="zero",
    )  # fmt: skip
    denoiser = gaussian(schedule, prediction)
    noise = torch.randn(5, 1, 4, 4)
    ours = samplers.sample(denoiser, noise, steps, "dpmpp_2m")
    stock = stock_images(scheduler, denoiser, noise, steps)
    assert (ours - stock).abs().max() < 2e-5


def _seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
@pytest.mark.parametrize("path", PATHS)
def test_order_of_convergence(sampler, order, path):
    """Errors against the exact flow between two times, fitted over doublings of the step count."""
    schedule, prediction = PATHS[path]
    denoiser = gaussian(schedule, prediction)
    x = torch.randn(4, 1, 4, 4, dtype=torch.float64)
    counts, errors = [128, 256, 512], []
    start, end = 0.75, 0.125
    for steps in counts:
        times = torch.linspace(start, end, steps + 1, dtype=torch.float64)[:, None].expand(-1, 4)
        landed = samplers.find(sampler)(denoiser, x, times, clip=None, noise=None)
        errors.append((landed - flow(schedule, x, times[0], times[-1])).abs().max().item())
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert all(abs(slope - order) < 0.25 for slope in slopes), (errors, slopes)


def distribution(sampler, denoiser, times, start, **options):
    """Mean and standard deviation of what a sampler that is linear in its state and noises makes of N(start).

    A batch of 0, of 1, and of 0 with each of the noises alone gives its coefficients.
    """
    x = torch.zeros(len(times) + 1, 1, 1, 1, dtype=torch.float64)
    x[1] = 1
    drawn = iter(range(2, len(x)))

    def noise(x):
        only = torch.zeros_like(x)
        only[next(drawn)] = 1
        return only

    landed = sampler(denoiser, x, times, clip=None, noise=noise, **options).flatten()
    slope, *noises = (landed[1:] - landed[0]).tolist()
    variance = (slope * start.stddev.item()) ** 2 + sum(c * c for c in noises)
    return landed[0].item() + slope * start.mean.item(), math.sqrt(variance)


def normal(schedule, t):
    return marginal(schedule, t, torch.tensor(0.3).double(), torch.tensor(0.5).double())


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("path", PATHS)
def test_order_of_convergence_in_distribution(path, eta):
    """The ancestral sampler's mean is that of the exact path, its width is of order 1."""
    schedule, prediction = PATHS[path]
    start, end = normal(schedule, 0.75), normal(schedule, 0.125)
    errors = []
    for steps in (128, 256, 512):
        times = torch.linspace(0.75, 0.125, steps + 1, dtype=torch.float64).tolist()
        mean, std = distribution(samplers.ancestral, gaussian(schedule, prediction), times, start, eta=eta)
        assert abs(mean - end.mean) < 1e-6
        errors.append(abs(std - end.stddev.item()))
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert all(abs(slope - 1) < 0.1 for slope in slopes), (errors, slopes)


@pytest.mark.parametrize("path", PATHS)
def test_the_variance_between_two_times(path):
    """Of x_s given x_t and x0: that of N(alpha_s x0, sigma_s²) times that of x_t = a x_s + b eps."""
    schedule, _ = PATHS[path]
    pair = torch.rand(2, 100, dtype=torch.float64).sort(0, descending=True).values
    t, s = (pair * 0.98 + 0.01) + torch.tensor([[0.01], [0.0]])
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t), schedule.at(s)
    a = alpha_t / alpha_s
    b2 = sigma_t**2 - a**2 * sigma_s**2
    expected = 1 / (1 / sigma_s**2 + a**2 / b2)
    found = schedule.posterior_variance(alpha_t, sigma_t, alpha_s, sigma_s)
    assert torch.allclose(found, expected, rtol=1e-9)
    ends = schedule.numbers(1.0), schedule.numbers(0.5)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ends
    one = schedule.posterior_variance(alpha_t, sigma_t, alpha_s, sigma_s)
    a = alpha_t / alpha_s
    assert one == pytest.approx(sigma_s**2 * (sigma_t**2 - a**2 * sigma_s**2) / sigma_t**2, rel=1e-9)
    assert schedule.posterior_variance(alpha_t, sigma_t, *schedule.numbers(0.0)) == 0


class Consistency(nn.Module):
    """Where the exact flow through x_t begins: of Gaussian data in closed form."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, x_t, time):
        t = self.schedule.of_network_time(time)
        return flow(self.schedule, x_t, t, torch.zeros_like(t))


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("path", PATHS)
def test_renoise_draws_the_data_by_a_consistency_function(path, steps):
    """Exactly, whatever the number of steps, from the distribution at t = 1."""
    schedule, _ = PATHS[path]
    denoiser = Denoiser(Consistency(schedule), schedule, "sample")
    mean, std = distribution(samplers.renoise, denoiser, samplers.grid(steps), normal(schedule, 1.0))
    assert mean == pytest.approx(0.3, abs=1e-5) and std == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("path", PATHS)
def test_from_noise_to_data_on_every_path(path, sampler):
    """Down to t = 0 from the state that noise stands for, towards where the exact flow leads."""
    schedule, prediction = PATHS[path]
    noise, ones = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    exact = flow(schedule, schedule.from_noise(noise), ones, torch.zeros_like(ones))
    errors = [
        (samplers.sample(gaussian(schedule, prediction), noise, steps, sampler) - exact).abs().max().item()
        for steps in (50, 200)
    ]
    assert errors[1] < errors[0] / 2 and errors[1] < 0.01 * noise.abs().max(), errors


def test_the_exact_one_step_student():
    """A network that is the flow itself, as an x0 at t = 1, draws the teacher's limit in one step."""
    noise = torch.randn(4, 1, 4, 4, dtype=torch.float64)
    ones, zeros = torch.ones(4).double(), torch.zeros(4).double()
    exact = flow(COSINE, noise, ones, zeros)
    assert torch.allclose(
        exact, 0.3 + 0.5 * noise
    )  # zero terminal SNR: the noise, given the data's mean and width
    teacher = samplers.sample(gaussian(COSINE), noise, 1024)
    assert (teacher - exact).abs().max() < 5e-3


def test_heun_ends_in_a_first_order_step():
    denoiser = gaussian(COSINE)
    for sampler in samplers.SAMPLERS:
        denoiser.network.calls = 0
        samplers.sample(denoiser, torch.randn(2, 1, 4, 4), 5, sampler)
        assert denoiser.network.calls == samplers.nfe(sampler, 5) == (9 if sampler == "heun" else 5)
    heun = samplers.sample(denoiser, noise := torch.randn(2, 1, 4, 4, dtype=torch.float64), 1, "heun")
    assert torch.allclose(heun, samplers.sample(denoiser, noise, 1, "ddim"))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_every_image_has_its_own_times(sampler, path):
    """A batch whose images are at different times is each image alone, the one that ends at 0 included."""
    denoiser = gaussian(*PATHS[path])
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    s = torch.tensor([0.75, 0.125, 0.0], dtype=torch.float64)
    times = torch.stack([t, (2 * t + s) / 3, (t + 2 * s) / 3, s])
    noise = torch.sin  # for the stochastic samplers: a function of each image alone
    together = samplers.find(sampler)(denoiser, x, times, clip=None, noise=noise)
    for i in range(3):
        alone = samplers.find(sampler)(denoiser, x[i : i + 1], times[:, i : i + 1], clip=None, noise=noise)
        assert torch.allclose(together[i : i + 1], alone, atol=1e-13)
    assert together.isfinite().all()


def test_the_public_ddim_step_is_the_samplers():
    x_t, denoised = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    t, s = torch.tensor([1.0, 0.5, 0.1]).double(), torch.tensor([0.5, 0.25, 0.0]).double()
    x_s = samplers.ddim_step(COSINE, x_t, denoised, t, s)
    alpha_t, sigma_t = COSINE.at(t, like=x_t)
    alpha_s, sigma_s = COSINE.at(s, like=x_t)
    eps = (x_t - alpha_t * denoised) / sigma_t
    assert torch.allclose(x_s, alpha_s * denoised + sigma_s * eps, atol=1e-12)
    assert torch.equal(x_s[2], denoised[2])


def test_images_are_as_wide_as_the_data():
    """The stochastic sampler draws from the same distribution: mean and width of N(0.3, 0.5²)."""
    denoiser = gaussian(COSINE)
    noise = torch.randn(4000, 1, 2, 2, generator=_seeded(0))
    images = samplers.sample(denoiser, noise, 256, "ancestral", eta=1.0, generator=_seeded(1))
    assert abs(images.mean() - 0.3) < 4 * 0.5 / 16000**0.5
    assert abs(images.std() - 0.5) < 0.01


def test_stock_ddim_scheduler_of_the_defaults_differs():
    """Why students are saved with settings of our own: diffusers' defaults draw other images."""
    denoiser = gaussian(LINEAR, "v_prediction")
    noise = torch.randn(3, 1, 4, 4)
    default = DDIMScheduler(**LINEAR.betas, prediction_type="v_prediction")
    assert (
        stock_images(default, denoiser, noise, 4) - samplers.sample(denoiser, noise, 4)
    ).abs().max() > 1e-2


def test_bad_requests():
    denoiser = gaussian(COSINE)
    with pytest.raises(UserError, match="'euler' is unknown; use one of ddim, heun"):
        samplers.sample(denoiser, torch.randn(1, 1, 4, 4), 4, "euler")
    with pytest.raises(UserError, match="steps 0"):
        samplers.sample(denoiser, torch.randn(1, 1, 4, 4), 0)
