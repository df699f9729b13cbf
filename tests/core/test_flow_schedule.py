"""Flow schedules: closed forms, the stock scheduler's grids and steps, what is refused."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from diffkd.core import samplers
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import FlowSchedule, Nodes, Shift, from_diffusers, mu_of, stretched
from diffkd.errors import UserError

EPS = torch.finfo(torch.float32).eps
LAWS = {
    "plain": Shift(),
    "shifted": Shift(3.0),
    "near-data": Shift(0.4),
    "dynamic": Shift.dynamic(0.81),
    "linear": Shift.dynamic(2.1, "linear"),
    "terminal": Nodes(tuple(stretched([i / 8 for i in range(8, 0, -1)], 0.1))),
    "below-noise": Nodes((0.96, 0.7, 0.02, 0.0)),
}


@pytest.fixture(params=LAWS)
def schedule(request):
    return FlowSchedule(LAWS[request.param])


def random_times(count=300):
    t = torch.rand(count, dtype=torch.float64)
    return torch.cat([t, t / 1000, 1 - t / 1000, torch.tensor([0.0, 0.125, 0.5, 1.0], dtype=torch.float64)])


def stock_of(shift=1.0, **options):
    return FlowMatchEulerDiscreteScheduler(shift=shift, **options)


def test_alpha_and_sigma_make_one(schedule):
    t = random_times().sort().values
    alpha, sigma = schedule.at(t)
    assert torch.equal(alpha, 1 - sigma) and (sigma.diff() >= 0).all()
    assert sigma[0] == 0 and sigma[-1] <= 1 and schedule.zero_terminal_snr == (sigma[-1].item() == 1)
    assert torch.allclose(torch.stack(schedule.squares(t)), torch.stack([alpha, sigma]) ** 2, atol=1e-16)
    assert torch.equal(schedule.snr(t), alpha**2 / sigma**2)
    for one, a, s in zip(t[::97].tolist(), alpha[::97].tolist(), sigma[::97].tolist(), strict=True):
        assert schedule.numbers(one) == (a, s)


def test_a_time_is_found_by_its_log_snr(schedule):
    t = random_times()
    found = schedule.time_of(schedule.half_log_snr(t))
    assert found.dtype == torch.float64 and (found - t).abs().max() < 1e-12
    beyond = torch.tensor([math.inf, -math.inf], dtype=torch.float64)
    assert schedule.time_of(beyond).tolist() == [0.0, 1.0]


def test_networks_are_given_t_sigma(schedule):
    t = random_times()
    time = schedule.network_time(t, t)
    assert time.dtype == torch.float32
    _, sigma = schedule.at(t, like=torch.empty(1))
    assert torch.equal(time, sigma * 1000)
    one = schedule.network_time(0.625, torch.empty(3, 1, 2, 2))
    assert torch.equal(one, schedule.network_time(torch.full((3,), 0.625).double(), t))
    inside = t > 1e-3
    assert (schedule.of_network_time(time) - t)[inside].abs().max() < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 5, 8, 28])
@pytest.mark.parametrize("shift", [0.5, 1.0, 1.5, 3.0, 3.1582, 7.0])
def test_an_even_grid_is_the_stock_schedulers_bit_for_bit(shift, steps):
    """Pipelines of Flux's kind hand it the even sigmas that it shifts."""
    stock = stock_of(shift)
    stock.set_timesteps(sigmas=[i / steps for i in range(steps, 0, -1)])
    schedule = FlowSchedule(Shift(shift))
    t = torch.tensor(samplers.grid(steps), dtype=torch.float64)
    assert torch.equal(schedule.at(t, like=torch.empty(1))[1], stock.sigmas)
    assert torch.equal(schedule.network_time(t[:-1], t), stock.timesteps)


@pytest.mark.parametrize("steps", [1, 4, 9])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_dynamic_shift_is_the_stock_schedulers(kind, steps):
    stock = stock_of(use_dynamic_shifting=True, time_shift_type=kind)
    mu = mu_of(1024) if kind == "exponential" else 2.3
    stock.set_timesteps(sigmas=[i / steps for i in range(steps, 0, -1)], mu=mu)
    sigma = from_diffusers(stock, mu=mu).at(torch.tensor(samplers.grid(steps)))[1]
    assert (sigma - stock.sigmas).abs().max() < 4 * EPS


def test_mu_is_linear_in_tokens():
    assert mu_of(256) == 0.5 and mu_of(4096) == pytest.approx(1.15)
    assert mu_of(2176) == pytest.approx(0.825) and mu_of(10, 10, 20, 0.3, 0.9) == 0.3


@pytest.mark.parametrize("options", [{"shift": 1.0}, {"shift": 2.5}, {"use_dynamic_shifting": True}], ids=str)
@pytest.mark.parametrize("steps", [2, 5, 12])
def test_a_stretched_grid_is_the_stock_schedulers(steps, options):
    stock = stock_of(shift_terminal=0.07, **options)
    mu = 0.9 if "use_dynamic_shifting" in options else None
    even = [i / steps for i in range(steps, 0, -1)]
    stock.set_timesteps(sigmas=even, mu=mu)
    law = Shift(options["shift"]) if mu is None else Shift.dynamic(mu)
    shifted = law.sigma(torch.tensor(even).double(), torch.float64).tolist()
    ours = torch.tensor([*stretched(shifted, 0.07), 0.0])
    assert (ours - stock.sigmas).abs().max() < 4 * EPS and ours[-2] == pytest.approx(0.07)


@pytest.mark.parametrize(
    "options",
    [
        {"shift": 3.0},
        {"shift": 2.0, "shift_terminal": 0.1},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "shift_terminal": 0.02, "time_shift_type": "linear"},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True, "shift": 1.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [2, 4, 7])
def test_the_stock_schedulers_own_grid_on_request(options, steps):
    """At an even grid of times the sigmas are its own, bit for bit; also where its shift was set later."""
    stock = stock_of(**options)
    mu = 0.7 if "use_dynamic_shifting" in options else None
    if mu is None:
        stock.set_shift(1.9)
    schedule = from_diffusers(stock, steps=steps, mu=mu)
    stock.set_timesteps(steps, mu=mu)
    t = torch.tensor(samplers.grid(steps), dtype=torch.float64)
    assert torch.equal(schedule.at(t, like=torch.empty(1))[1], stock.sigmas)
    assert torch.equal(schedule.network_time(t[:-1], t), stock.timesteps)
    schedule.check_steps(steps)


# steps ----------------------------------------------------------------------------------------------------


class Velocity(nn.Module):
    """A network in float32, elementwise, so that it rounds alike in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.7))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.scale * x) + time.reshape(-1, 1, 1, 1) / 700


def stock_images(stock, network, x, **grid):
    stock.set_timesteps(**grid)
    for time in stock.timesteps:
        with torch.no_grad():
            x = stock.step(network(x, time.expand(len(x))), time, x).prev_sample
    return x


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("given", [True, False], ids=["even", "own"])
@pytest.mark.parametrize("options", [{"shift": 3.0}, {"shift": 1.15, "shift_terminal": 0.1}], ids=str)
@torch.no_grad()
def test_ddim_is_the_stock_euler_bit_for_bit(options, given, steps):
    if "shift_terminal" in options and (given or steps == 1):  # which is of the scheduler's own grid
        steps, given = 3, False
    stock = stock_of(**options)
    denoiser = Denoiser(Velocity(), from_diffusers(stock, steps=None if given else steps), "flow")
    noise = torch.randn(3, 2, 4, 4)
    grid = {"sigmas": [i / steps for i in range(steps, 0, -1)]} if given else {"num_inference_steps": steps}
    drawn = stock_images(stock, denoiser.network, noise, **grid)
    assert torch.equal(samplers.sample(denoiser, noise, steps), drawn)
    times = torch.tensor(samplers.grid(steps), dtype=torch.float64)[:, None].expand(-1, 3)
    assert torch.equal(samplers.ddim(denoiser, noise, times), drawn)


@pytest.mark.parametrize("steps", [1, 2, 5])
@torch.no_grad()
def test_renoise_is_the_stock_stochastic_step_bit_for_bit(steps):
    stock = stock_of(shift=2.2, stochastic_sampling=True)
    denoiser = Denoiser(Velocity(), from_diffusers(stock), "flow")
    noise, sigmas = torch.randn(3, 2, 4, 4), [i / steps for i in range(steps, 0, -1)]
    images = []
    for draw in (
        lambda: stock_images(stock, denoiser.network, noise, sigmas=sigmas),
        lambda: samplers.sample(denoiser, noise, steps, "renoise"),
    ):
        with torch.random.fork_rng():  # flow pipelines hand the step no generator, and older steps take none
            torch.manual_seed(5)
            images.append(draw())
    assert torch.equal(*images)


@torch.no_grad()
def test_the_euler_step_is_ddims():
    """In float64 both forms of the step are one; a bound on x0 takes the other."""
    denoiser = Denoiser(Velocity().double(), FlowSchedule(Shift(2.0)), "flow")
    noise = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    euler = samplers.sample(denoiser, noise, 6)
    assert torch.allclose(euler, samplers.sample(denoiser, noise, 6, "ancestral", eta=0.0), atol=1e-6)
    denoiser.clip = 1e9
    assert torch.allclose(euler, samplers.sample(denoiser, noise, 6), atol=1e-6)
    denoiser.clip = 0.1
    assert samplers.sample(denoiser, noise, 6).abs().max() <= 0.1


# what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_predictions_that_give_no_x0(prediction):
    with pytest.raises(
        UserError, match=f"{prediction} does not give x0 on a flow schedule.*use flow or sample"
    ):
        Denoiser(Velocity(), FlowSchedule(), prediction)


def test_epsilon_is_fine_below_pure_noise():
    Denoiser(Velocity(), FlowSchedule(LAWS["below-noise"]), "epsilon")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Shift(0), "shift of 0 is out of range"),
        (lambda: Shift(math.inf), "shift of inf is out of range"),
        (lambda: Shift("3"), "shift of '3' is out of range"),
        (
            lambda: Shift.dynamic(1.0, "cubic"),
            "time_shift_type 'cubic' is unknown; use exponential or linear",
        ),
        (lambda: Nodes(()), r"sigmas \[\] are no grid of a flow"),
        (lambda: Nodes((1.2, 0.4)), "no grid of a flow; use numbers that fall from at most 1"),
        (lambda: Nodes((0.5, 0.5)), "no grid of a flow"),
        (lambda: Nodes((0.5, math.nan)), "no grid of a flow"),
        (lambda: stretched([1.0], 0.1), "single step from pure noise has no last sigma"),
        (lambda: stretched([1.0, 0.5], 1.0), "shift_terminal 1.0 is out of range"),
        (lambda: FlowSchedule().check_steps(0), "0 steps does not fit a schedule of 1000"),
        (lambda: FlowSchedule().check_steps(1001), "use 1 to 1000"),
        (lambda: FlowSchedule(LAWS["terminal"]).check_steps(3), "grid of 8 sigmas; use one of 1, 2, 4, 8"),
    ],
)
def test_bad_values(make, says):
    with pytest.raises(UserError, match=says):
        make()
