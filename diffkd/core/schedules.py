"""Noise schedules, all that there are: read from diffusers schedulers and written as them; prediction types.

Time runs from 0 (data) to 1 (noise).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from diffkd.core import scheduler_config
from diffkd.core.edm_schedule import EDMSchedule, Preconditioned
from diffkd.core.flow_schedule import FlowSchedule, Nodes, Shift, mu_of, stretched
from diffkd.core.flow_schedulers import to_flow_diffusers
from diffkd.core.noise_schedule import BetaSchedule, Schedule, Time, from_betas
from diffkd.core.predictions import PREDICTIONS, Prediction, read_prediction, write_prediction
from diffkd.errors import UserError

if TYPE_CHECKING:  # to import it takes seconds, and images are measured without it
    from diffusers import DDIMScheduler, LCMScheduler

__all__ = [
    "PREDICTIONS", "BetaSchedule", "EDMSchedule", "FlowSchedule", "Nodes", "Preconditioned", "Prediction",
    "Schedule", "Shift", "Time", "from_betas", "from_diffusers", "mu_of", "prediction_of", "read_prediction",
    "stretched", "to_diffusers", "to_flow_diffusers", "write_prediction",
]  # fmt: skip


def from_diffusers(scheduler: Any, *, steps: int | None = None, mu: float | None = None) -> Schedule:
    """The schedule of a diffusers scheduler: of betas, of a flow or of EDM's kind.

    steps: of a flow or EDM, the stock scheduler's own grid of so many steps instead of diffkd's even one. mu:
    of a flow whose shift is dynamic (`mu_of`). Raises UserError for a scheduler that is not read as it is
    meant, naming the field.
    """
    if scheduler_config.is_flow(scheduler):
        return _from_flow(scheduler, steps, mu)
    _check_none(scheduler, "mu", mu)
    if scheduler_config.is_edm(scheduler):
        scheduler_config.check_edm(scheduler)
        config = scheduler.config
        total = config.num_train_timesteps if steps in (None, 1) else steps  # a single step is of every grid
        return EDMSchedule(config.sigma_min, config.sigma_max, config.rho, config.sigma_data, total)
    _check_none(scheduler, "steps", steps)
    return from_betas(scheduler)


def prediction_of(scheduler: Any) -> str:
    """What its network outputs, in diffkd's words; a network of EDM's kind is `Preconditioned` first.

    Raises UserError for a flow that `from_diffusers` refuses.
    """
    if scheduler_config.is_edm(scheduler):
        return "sample"
    name = str(scheduler.config.get("prediction_type", "flow_prediction"))
    if not scheduler_config.is_flow(scheduler):
        return name
    scheduler_config.check_flow(scheduler)
    return scheduler_config.FLOW_PREDICTIONS[name]


def _from_flow(scheduler: Any, steps: int | None, mu: float | None) -> FlowSchedule:
    scheduler_config.check_flow(scheduler)
    kind, config = type(scheduler).__name__, scheduler.config
    alone = scheduler_config.is_flow_match(scheduler)
    if not config.get("use_dynamic_shifting"):
        _check_none(scheduler, "mu", mu)
    elif mu is None:
        raise UserError(
            f"scheduler {kind} has use_dynamic_shifting, a shift that its pipeline makes of image sizes; "
            "name its mu, or set use_dynamic_shifting to false and a shift"
        )
    if steps is not None:
        if not alone:
            raise UserError(
                f"scheduler {kind} gives its network times without fractions on its own grid, which diffkd "
                f"does not; leave out steps, or use {scheduler_config.FLOW}"
            )
        least = 2 if config.get("shift_terminal") else 1  # which is the last sigma, and not the first
        if steps < least:
            raise UserError(f"scheduler {kind} has no grid of {steps} steps; use {least} or more")
        own = copy.deepcopy(scheduler)
        own.set_timesteps(steps, **({} if mu is None else {"mu": mu}))
        return FlowSchedule(Nodes(tuple(own.sigmas.tolist())), config.num_train_timesteps)
    if config.get("shift_terminal"):
        raise UserError(
            f"scheduler {kind} has shift_terminal {config.shift_terminal}, with which its grid depends on "
            "the number of steps; name steps, or set it to null"
        )
    own_shift = alone and hasattr(type(scheduler), "shift")  # which may be set, whatever the config says
    shift = scheduler.shift if own_shift else config["shift" if alone else "flow_shift"]
    law = Shift(shift) if mu is None else Shift.dynamic(mu, config.time_shift_type)
    return FlowSchedule(law, config.num_train_timesteps)


def _check_none(scheduler: Any, name: str, value: Any) -> None:
    if value is not None:
        raise UserError(f"scheduler {type(scheduler).__name__} takes no {name} {value}; leave it out")


def to_diffusers(
    schedule: Schedule, prediction: str, clip: float | None = None, sampler: str = "ddim"
) -> DDIMScheduler | LCMScheduler:
    """The stock scheduler that draws the same images from a student of this schedule as `samplers.sample`.

    clip: bound on the predicted x0 while sampling, None for none. sampler: ddim or renoise.
    Raises UserError for what these schedulers do not draw.
    """
    from diffusers import DDIMScheduler, LCMScheduler

    if not isinstance(schedule, BetaSchedule):
        raise UserError(
            f"DDIMScheduler and LCMScheduler draw no {type(schedule).__name__}; give the student a "
            "BetaSchedule (core.paths says which of its times are the teacher's)"
            + (", or a pipeline of flows (to_flow_diffusers)" if schedule.straight else "")
        )
    if prediction not in PREDICTIONS[:3]:
        raise UserError(
            f"DDIMScheduler does not support prediction {prediction!r}; "
            f"use one of {', '.join(PREDICTIONS[:3])}"
        )
    options: dict[str, Any] = {
        **schedule.betas, "prediction_type": prediction, "clip_sample": clip is not None,
        "clip_sample_range": 1.0 if clip is None else clip,
    }  # fmt: skip
    if sampler == "renoise":
        # The scaling makes its boundary conditions c_skip = 0 and c_out = 1, and so x0 the prediction itself.
        return LCMScheduler(
            **options, original_inference_steps=schedule.num_train_timesteps, timestep_scaling=1e10
        )
    return DDIMScheduler(**options, timestep_spacing="trailing", set_alpha_to_one=True)
