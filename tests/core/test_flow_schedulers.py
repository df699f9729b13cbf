"""Stock schedulers of flows: what is written draws the sampler's own states, and is read back."""

from __future__ import annotations

import diffusers
import pytest
import torch

from diffkd.core import samplers
from diffkd.core.denoiser import Denoiser
from diffkd.core.flow_schedule import FlowSchedule, Nodes, Shift, even, fitted
from diffkd.core.flow_schedulers import own_grid, read_shift, to_flow_diffusers
from diffkd.errors import UserError

Euler = diffusers.FlowMatchEulerDiscreteScheduler
SHIFTS = [0.5, 1.0, 3.0, 6.5]


class Network(torch.nn.Module):
    """A velocity that depends on state and time; of no weights to speak of."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, x, time):
        return torch.sin(self.weight * x + time.to(x.dtype).reshape(-1, 1, 1, 1) / 300)


def stock(scheduler, noise, steps, handed):
    """The loop of a pipeline: which hands the even grid, or leaves it to the scheduler."""
    if handed:
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    else:
        scheduler.set_timesteps(steps)
    network, x = Network(), noise
    for t in scheduler.timesteps:
        output = network(x, t.expand(len(x)))
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("handed", [True, False])
@pytest.mark.parametrize("sampler", ["ddim", "renoise"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@torch.no_grad()
def test_the_scheduler_draws_what_the_sampler_does(tmp_path, steps, sampler, handed):
    """To the bit where it is handed the grid; else within the rounding of a grid in float64."""
    schedule, noise = FlowSchedule(Shift(3.0), handed=handed), torch.randn(3, 2, 4, 4)
    made = to_flow_diffusers(schedule, "flow", sampler, steps=steps)
    made.save_pretrained(tmp_path)
    made = type(made).from_pretrained(tmp_path)
    denoiser = Denoiser(Network(), schedule, "flow", shape=(2, 4, 4))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = stock(made, noise, steps, handed)
    rng = torch.Generator().manual_seed(3)
    ours = samplers.sample(
        denoiser, noise, steps, sampler, fresh=lambda x: torch.randn(x.shape, generator=rng)
    )
    assert (ours - theirs).abs().max() <= (0.0 if handed and sampler == "ddim" else 2e-6)
    assert not made.config.get("use_dynamic_shifting")
    assert read_shift(made, steps, handed=handed) == Shift(3.0)


@pytest.mark.parametrize("without", [False, True], ids=["flow map", "an older diffusers"])
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", [1, 2, 5, 28, 500])
def test_a_grid_that_is_left_to_the_scheduler(monkeypatch, shift, steps, without):
    if without:
        monkeypatch.setattr(diffusers, "FlowMapEulerDiscreteScheduler", None, raising=False)
    made = to_flow_diffusers(FlowSchedule(Shift(shift), handed=False), "flow", steps=steps)
    assert isinstance(made, Euler) == without
    grid = torch.tensor(own_grid(made, steps, handed=False), dtype=torch.float64)
    assert (grid - Shift(shift).sigma(even(steps), torch.float64)).abs().max() < 3e-7
    assert read_shift(made, steps, handed=False) == Shift(shift)


def test_the_plain_shift_is_another_grid():
    """And so refused for a student whose pipeline leaves the grid to its scheduler."""
    assert own_grid(Euler(shift=3.0), 4, handed=False) == pytest.approx([1, 0.8577, 0.6022, 0.0089], abs=1e-4)
    assert read_shift(Euler(shift=3.0), 4, handed=True) == Shift(3.0)
    with pytest.raises(UserError, match=r"the sigmas 1, 0.8577, 0.6022, 0.008929 in 4 steps, and those of"):
        read_shift(Euler(shift=3.0), 4, handed=False)
    assert read_shift(Euler(shift=3.0), 1, handed=False) == Shift(3.0)


def test_the_fit_is_the_one_of_its_formula():
    assert fitted(3.0, 4) == (pytest.approx(2.004020116745064, rel=1e-14), 0.5)
    assert fitted(3.0, 1) == (3.0, None) and fitted(1.0, 4)[0] == pytest.approx(1.0)


def test_a_shift_that_no_fit_gives_is_refused_before_anything_is_trained():
    """With the grid that there is."""
    schedule = FlowSchedule(Shift(100.0), handed=False)
    with pytest.raises(
        UserError, match=r"20 steps at a shift of 100 .* its own is 1, 0.9995, .*, 0.9092; use"
    ):
        schedule.check_steps(20, "renoise")
    schedule.check_steps(20)
    schedule.check_steps(4, "renoise")
    FlowSchedule(Shift(100.0)).check_steps(20, "renoise")


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_grid_of_some_sigmas_is_a_shift_where_it_is_one(steps):
    """That of every divisor of a shifted grid, and no other."""
    law = Nodes(tuple(Shift(3.0).sigma(even(4), torch.float32).tolist()))
    made = to_flow_diffusers(FlowSchedule(law), "flow", steps=steps)
    assert steps == 1 or made.config.shift == pytest.approx(3.0, rel=1e-6)
    other = FlowSchedule(Nodes((1.0, 0.9, 0.2, 0.1)))
    with pytest.raises(UserError, match="no stock scheduler draws the sigmas 1, 0.9, 0.2, 0.1 in 4 steps"):
        to_flow_diffusers(other, "flow", steps=4)
    with pytest.raises(UserError, match="one grid of sigmas has no scheduler for any number of steps"):
        to_flow_diffusers(other, "flow")


def test_only_networks_that_predict_flow():
    with pytest.raises(UserError, match="take networks that predict flow, and this one predicts sample"):
        to_flow_diffusers(FlowSchedule(), "sample", steps=1)
