"""The stock schedulers that draw students on the straight path of a flow, and the grids that they step by."""

from __future__ import annotations

import copy
from typing import Any

import torch

from diffkd.core.flow_schedule import FlowSchedule, Law, Shift, even, fitted, listed
from diffkd.core.scheduler_config import FLOW_MAP
from diffkd.errors import UserError

GRID_TOLERANCE = 1e-6  # of a sigma; stock schedulers round to float32


def to_flow_diffusers(
    schedule: FlowSchedule, prediction: str, sampler: str = "ddim", *, steps: int | None = None
) -> Any:
    """The stock scheduler that draws the same images from a student of this schedule as `samplers.sample`, in
    a pipeline of the kind that `schedule.handed` says.

    sampler: ddim, or renoise, whose fresh noise is of torch's global generator in most pipelines. steps: the
    student's own; None for a model of any number of them. Raises UserError for what no scheduler draws.

    FlowMatchEulerDiscreteScheduler shifts the even grid that it is handed. Left to itself it makes another:
    then it is FlowMapEulerDiscreteScheduler, or, for renoise and with a diffusers that lacks it, the first
    with a shift that is fitted to so many steps.
    """
    import diffusers

    if prediction != "flow":
        raise UserError(
            f"stock schedulers of flows take networks that predict flow, and this one predicts {prediction}; "
            "train it to predict flow"
        )
    euler: Any = diffusers.FlowMatchEulerDiscreteScheduler
    even_in_time: Any = getattr(diffusers, FLOW_MAP, None)
    shift, total = _shift_of(schedule.law, steps).shift, schedule.num_train_timesteps
    options: dict[str, Any] = {"num_train_timesteps": total, "shift": shift}
    if sampler == "renoise":
        options["stochastic_sampling"] = True
    elif not schedule.handed and even_in_time is not None:
        return even_in_time(**options)
    if not schedule.handed and steps is not None:
        options["shift"], options["shift_terminal"] = fitted(shift, steps, total)
    return euler(**options)


def _shift_of(law: Law, steps: int | None) -> Shift:
    """The shift that makes the law's own grid of an even one of so many times. Raises UserError where none
    does."""
    if isinstance(law, Shift):
        return law
    if steps is None:
        raise UserError("a flow of one grid of sigmas has no scheduler for any number of steps; name them")
    wanted = law.sigma(even(steps), torch.float64)
    last = wanted[-1].item()
    found = Shift(last * (steps - 1) / (1 - last) if steps > 1 else 1.0)
    made = found.sigma(even(steps), torch.float64)
    if (made - wanted).abs().max() > GRID_TOLERANCE:
        raise UserError(
            f"no stock scheduler draws the sigmas {listed(wanted.tolist())} in {steps} steps; a shift of "
            f"{found.shift:.6g} gives {listed(made.tolist())}"
        )
    return found


def read_shift(scheduler: Any, steps: int, *, handed: bool) -> Shift:
    """The shift of a student of so many steps by the scheduler that it was saved with.

    Raises UserError where that gives its pipeline another grid than the even one of times, shifted.
    """
    config = scheduler.config
    terminal = config.get("shift_terminal")
    shift = config.get("shift")
    if terminal and steps > 1 and not handed:
        shift = float(f"{terminal * (steps - 1) / (1 - terminal):.12g}")
    found = Shift(shift)
    wanted = found.sigma(even(steps), torch.float64).tolist()
    made = own_grid(scheduler, steps, handed=handed)
    if any(abs(a - b) > GRID_TOLERANCE for a, b in zip(made, wanted, strict=True)):
        raise UserError(
            f"its scheduler gives the stock pipeline the sigmas {listed(made)} in {steps} steps, and those "
            f"of a student at shift {shift:g} are {listed(wanted)}; save it with a {FLOW_MAP}"
        )
    return found


def own_grid(scheduler: Any, steps: int, *, handed: bool) -> list[float]:
    """The sigmas that a pipeline of this kind steps by, without the last 0."""
    own = copy.deepcopy(scheduler)
    if handed:
        own.set_timesteps(sigmas=even(steps).tolist())
    else:
        own.set_timesteps(steps)
    sigmas: list[float] = own.sigmas.tolist()
    return sigmas[:-1]
