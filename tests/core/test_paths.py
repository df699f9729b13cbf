"""One model on two schedules, against a Gaussian in closed form."""

import itertools

import pytest
import torch
from diffusers import DDPMScheduler

from diffkd.core.paths import check_reaches, output_on, state_on, time_on
from diffkd.core.schedules import (
    EDMSchedule,
    FlowSchedule,
    Nodes,
    Schedule,
    Shift,
    from_diffusers,
    write_prediction,
)
from diffkd.errors import UserError
from tests.gaussian import flow

MEAN, STD = 0.3, 0.5
LINEAR = from_diffusers(DDPMScheduler())
SCHEDULES = {
    "cosine": Schedule.cosine(256),
    "linear": LINEAR,
    "flow": FlowSchedule(Shift(3.0)),
    "grid": FlowSchedule(Nodes((1.0, 0.8, 0.3))),
    "edm": EDMSchedule(),
}
PAIRS = list(itertools.permutations(SCHEDULES, 2))


def posterior_mean(schedule, x_t, t):
    """E[x0 | x_t] of data from N(MEAN, STD² I)."""
    alpha, sigma = schedule.at(t, like=x_t)
    return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * MEAN)


def shared_times(source, target, count):
    """Times of the source whose noise level the target has too, in (0, 1)."""
    end = time_on(target, source, torch.ones(1, dtype=torch.float64))
    return (0.002 + 0.996 * torch.rand(count, dtype=torch.float64)) * end


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_denoiser_of_one_is_a_denoiser_of_the_other(source, target):
    """D(x_t, t) on one schedule is D of the moved state at the moved time on the other; and back again."""
    source, target = SCHEDULES[source], SCHEDULES[target]
    t, eps = shared_times(source, target, 64), torch.randn(64, 1, 2, 2, dtype=torch.float64)
    x0 = MEAN + STD * torch.randn_like(eps)
    alpha, sigma = source.at(t, like=x0)
    x_t = alpha * x0 + sigma * eps
    s = time_on(source, target, t)
    x_s = state_on(source, target, x_t, t, s)
    alpha, sigma = target.at(s, like=x0)
    assert torch.allclose(x_s, alpha * x0 + sigma * eps, rtol=1e-10, atol=1e-10)
    assert (posterior_mean(source, x_t, t) - posterior_mean(target, x_s, s)).abs().max() < 1e-10
    assert torch.allclose(time_on(target, source, s), t, rtol=0, atol=1e-10)
    assert torch.allclose(state_on(target, source, x_s, s, t), x_t, rtol=1e-12)


KINDS = {
    "cosine": ("v_prediction", "sample", "flow"), "linear": ("epsilon", "v_prediction", "flow"),
    "flow": ("flow", "sample"), "grid": ("flow",), "edm": ("sample", "epsilon", "flow"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("source", "target"),
    [((a, kind), (b, other)) for a in KINDS for b in KINDS for kind in KINDS[a] for other in KINDS[b]],
    ids="-".join,
)
def test_what_one_network_outputs_is_what_the_other_does(source, target):
    """The exact output of each prediction type on each schedule, from that of any other: v, flow, eps, x0."""
    (source, kind), (target, other) = source, target
    source, target = SCHEDULES[source], SCHEDULES[target]
    t = shared_times(source, target, 64).clamp(
        min=0.02
    )  # eps and x0 are each read by a division near one end
    x_t = flow(source, torch.randn(64, 1, 2, 2, dtype=torch.float64), torch.full_like(t, 0.5), t)
    output = write_prediction(kind, x_t, posterior_mean(source, x_t, t), *source.at(t, like=x_t))
    s = time_on(source, target, t)
    x_s = state_on(source, target, x_t, t, s)
    expected = write_prediction(other, x_s, posterior_mean(target, x_s, s), *target.at(s, like=x_s))
    found = output_on(source, target, (kind, other), x_t, output, t, s)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_data_is_data(source, target):
    x0, zeros = torch.randn(2, 1, 3, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    s = time_on(SCHEDULES[source], SCHEDULES[target], zeros)
    assert torch.equal(s, zeros)
    assert torch.equal(state_on(SCHEDULES[source], SCHEDULES[target], x0, zeros, s), x0)


def test_pure_noise_is_pure_noise():
    """Both end at alpha = 0: the state stays as it is, at the times 1."""
    noise, ones = torch.randn(2, 1, 3, 3, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    source, target = SCHEDULES["flow"], SCHEDULES["cosine"]
    s = time_on(source, target, ones)
    assert torch.equal(s, ones) and torch.equal(state_on(source, target, noise, ones, s), noise)


def test_levels_that_a_model_does_not_know():
    for name in ("cosine", "flow"):
        for other in SCHEDULES.values():
            check_reaches(SCHEDULES[name], other)
    check_reaches(LINEAR, SCHEDULES["edm"])
    with pytest.raises(
        UserError, match="ends at 80 has no model of the levels up to infinity; end the other"
    ):
        check_reaches(SCHEDULES["edm"], SCHEDULES["flow"])
    with pytest.raises(UserError, match="ends at 80 has no model of the levels up to 157"):
        check_reaches(SCHEDULES["edm"], LINEAR)
