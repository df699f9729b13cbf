"""Schedules of diffusers schedulers without a table of betas: what each field does, and what is refused."""

import inspect

import diffusers
import pytest
import torch

from diffkd.core.scheduler_config import EDM_FIELDS, FLOW_FIELDS, FLOW_MAP_FIELDS, SCHEDULERS
from diffkd.core.schedules import (
    BetaSchedule,
    EDMSchedule,
    FlowSchedule,
    Shift,
    from_betas,
    from_diffusers,
    prediction_of,
    read_prediction,
    to_diffusers,
)
from diffkd.errors import UserError

Euler = diffusers.FlowMatchEulerDiscreteScheduler
EDM = diffusers.EDMEulerScheduler
FLOW_MAP = [  # which older diffusers do not have
    (kind, FLOW_MAP_FIELDS)
    for kind in [getattr(diffusers, "FlowMapEulerDiscreteScheduler", None)]
    if kind is not None
]


def parameters(kind):
    return inspect.signature(kind.__init__).parameters.keys() - {"self", "kwargs"}


LIKE_BETAS = [
    kind
    for kind in (getattr(diffusers, name, None) for name in SCHEDULERS)
    if kind is not None and "use_flow_sigmas" in parameters(kind)
]


@pytest.mark.parametrize(("kind", "fields"), [(Euler, FLOW_FIELDS), (EDM, EDM_FIELDS), *FLOW_MAP])
def test_every_field_is_in_the_table(kind, fields):
    """A field of a newer diffusers fails here: it has to be looked at before it is drawn over."""
    assert parameters(kind) <= fields


def test_those_of_flow_kind_that_look_like_betas_are_known():
    names = {kind.__name__ for kind in LIKE_BETAS}
    assert {"DPMSolverMultistepScheduler", "UniPCMultistepScheduler"} <= names


@pytest.mark.parametrize("kind", LIKE_BETAS, ids=lambda kind: kind.__name__)
def test_a_flow_that_looks_like_betas_is_read_as_a_flow(kind):
    """Its own alpha, sigma and x0 at each of its sigmas; with betas, never."""
    scheduler = kind(
        num_train_timesteps=500, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.5
    )
    schedule = from_diffusers(scheduler)
    assert isinstance(schedule, FlowSchedule) and schedule.law == Shift(2.5)
    assert schedule.num_train_timesteps == 500 and prediction_of(scheduler) == "flow"
    scheduler.set_timesteps(6)
    sigma = scheduler.sigmas[:-1]
    sigma = sigma[sigma < 1]  # where a solver's own lambda is finite
    t = schedule.time_of((1 - sigma.double()).log() - sigma.double().log())
    alphas, sigmas = zip(*map(scheduler._sigma_to_alpha_sigma_t, sigma), strict=True)
    found = schedule.at(t, like=torch.empty(1))
    assert torch.allclose(torch.stack(found), torch.tensor([alphas, sigmas]), rtol=0, atol=2e-7)
    if not hasattr(scheduler, "convert_model_output") or "DEIS" in kind.__name__:  # which has eps
        return
    output, x_t = torch.randn(2, 1, 2, 3, 3)
    scheduler._step_index = len(scheduler.sigmas) - 1 - len(sigma)
    made = scheduler.convert_model_output(output, sample=x_t)
    x0, _ = read_prediction("flow", x_t, output, *(value[0] for value in found))
    assert torch.allclose(x0, made, atol=1e-5)


@pytest.mark.parametrize("kind", LIKE_BETAS, ids=lambda kind: kind.__name__)
def test_a_flow_that_looks_like_betas_is_never_betas(kind):
    scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.raises(UserError, match="has use_flow_sigmas True: its path is a flow, not a table of betas"):
        from_betas(scheduler)
    with pytest.raises(UserError, match="times without fractions on its own grid.*leave out steps"):
        from_diffusers(scheduler, steps=4)
    wrong = kind(prediction_type="epsilon", use_flow_sigmas=True)
    for read in (from_diffusers, prediction_of):
        with pytest.raises(
            UserError, match="prediction_type 'epsilon'; supported are flow_prediction, sample"
        ):
            read(wrong)
    assert isinstance(from_diffusers(kind()), BetaSchedule)


def test_predictions_in_diffkds_words():
    assert prediction_of(Euler()) == "flow" and prediction_of(EDM()) == "sample"
    assert prediction_of(diffusers.DDIMScheduler(prediction_type="v_prediction")) == "v_prediction"


def test_a_flow_scheduler_by_its_config():
    schedule = from_diffusers(Euler(num_train_timesteps=400, shift=1.7, use_karras_sigmas=True))
    assert schedule.law == Shift(1.7) and schedule.num_train_timesteps == 400
    dynamic = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", use_dynamic_shifting=True
    )
    assert from_diffusers(dynamic, mu=0.4).law == Shift.dynamic(0.4)


def test_an_edm_scheduler_by_its_config():
    schedule = from_diffusers(EDM(0.01, 50.0, 0.7, num_train_timesteps=40, rho=5.0))
    assert schedule.content() == EDMSchedule(0.01, 50.0, 5.0, 0.7, 40).content()


@pytest.mark.parametrize(
    ("scheduler", "options", "says"),
    [
        (Euler(invert_sigmas=True), {}, "FlowMatchEulerDiscreteScheduler has invert_sigmas True"),
        (Euler(use_dynamic_shifting=True), {}, "use_dynamic_shifting, a shift that its .*name its mu"),
        (Euler(), {"mu": 0.5}, "FlowMatchEulerDiscreteScheduler takes no mu 0.5; leave it out"),
        (Euler(shift_terminal=0.1), {}, "shift_terminal 0.1, .* name steps, or set it to null"),
        (Euler(), {"steps": 0}, "has no grid of 0 steps; use 1 or more"),
        (Euler(shift_terminal=0.1), {"steps": 1}, "has no grid of 1 steps; use 2 or more"),
        (EDM(), {"steps": 0}, "0 time steps make no EDM schedule"),
        (Euler(shift=-1.0), {}, "shift of -1.0 is out of range"),
        (EDM(sigma_schedule="exponential"), {}, "EDMEulerScheduler has sigma_schedule 'exponential'"),
        (EDM(), {"mu": 0.5}, "EDMEulerScheduler takes no mu"),
        (EDM(sigma_min=100.0), {}, "make no EDM schedule"),
        (diffusers.DDIMScheduler(), {"steps": 4}, "DDIMScheduler takes no steps 4; leave it out"),
        (diffusers.FlowMatchHeunDiscreteScheduler(), {}, "has no betas, and is not supported"),
    ],
)
def test_what_is_refused(scheduler, options, says):
    with pytest.raises(UserError, match=says):
        from_diffusers(scheduler, **options)


@pytest.mark.parametrize("schedule", [FlowSchedule(), EDMSchedule()], ids=lambda s: type(s).__name__)
def test_no_beta_scheduler_is_made_of_them(schedule):
    with pytest.raises(
        UserError, match=f"draw no {type(schedule).__name__}; give the student a BetaSchedule"
    ):
        to_diffusers(schedule, "sample")
