"""The scheduler of a pipeline of flows, read for a Denoiser: the same for every family that has one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from diffkd.core import flow_schedulers
from diffkd.core.denoiser import StockSampler
from diffkd.core.flow_schedule import FlowSchedule, mu_of
from diffkd.core.scheduler_config import FIELDS, FLOW, FLOW_FIELDS, FLOW_MAP, is_flow
from diffkd.core.schedules import from_diffusers, prediction_of
from diffkd.errors import UserError
from diffkd.io.text import a_or_an, log
from diffkd.models import schedulers
from diffkd.models.source import Source

SUPPORTED = (FLOW, FLOW_MAP)
Shape = tuple[int, int, int]  # (C, H, W) of latents
# of a dynamic shift, in the order of `mu_of`, and what pipelines take where a config does not say it
OF_MU = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}


class Sampling(NamedTuple):
    """What a Denoiser takes from a scheduler. schedule_of: for a dynamic shift that of images of each size,
    of which `schedule` is one; None for a static one."""

    schedule: FlowSchedule
    sampler: StockSampler
    schedule_of: Callable[[Shape], FlowSchedule] | None


@dataclass(frozen=True)
class Dynamic:
    """The schedules of a dynamic shift, by the shape of latents. patch: latents a side of a token."""

    scheduler: Any
    handed: bool
    patch: int

    def __call__(self, shape: Shape) -> FlowSchedule:
        config, tokens = self.scheduler.config, (shape[1] // self.patch) * (shape[2] // self.patch)
        mu = mu_of(tokens, *(config.get(key, default) for key, default in OF_MU.items()))
        return _read(self.scheduler, self.handed, mu)


def read(source: Source, shape: Shape, *, handed: bool, patch: int) -> Sampling:
    """handed: as for `FlowSchedule`. shape: of the latents of an image of the model's own size.

    Raises UserError for a scheduler that is not of a flow or that the samplers cannot stand for, and for a
    student's that does not draw it as its card says.
    """
    kind, config = schedulers.checked(source, FIELDS | FLOW_FIELDS)
    with schedulers.readable(source):
        terminal, steps = config.get("shift_terminal"), source.card.get("steps")
        if terminal and steps is None:
            log.warning(
                "%s has a scheduler with shift_terminal %s, which stretches its grid of each number of steps "
                "to that last sigma; diffkd's own grids end where even ones do", source.name, terminal,
            )  # fmt: skip
            config = {**config, "shift_terminal": None}
        scheduler = schedulers.built(kind, config, SUPPORTED)
        if not is_flow(scheduler):
            raise UserError(
                f"scheduler {kind} is not of a flow, which this pipeline's networks are; supported are "
                f"{', '.join(SUPPORTED)}"
            )
        if (prediction := prediction_of(scheduler)) != "flow":
            raise UserError(f"scheduler {kind} is of networks that predict {prediction}; supported is flow")
        sampler: StockSampler = "renoise" if scheduler.config.get("stochastic_sampling") else "ddim"
        schedule_of = None
        if steps is not None:
            schedule = _of_student(source, scheduler, sampler, steps, handed)
        elif scheduler.config.get("use_dynamic_shifting"):
            schedule_of = Dynamic(scheduler, handed, patch)
            schedule = schedule_of(shape)
        else:
            schedule = _read(scheduler, handed)
    schedulers.check_total(source, schedule)
    return Sampling(schedule, sampler, schedule_of)


def _read(scheduler: Any, handed: bool, mu: float | None = None) -> FlowSchedule:
    schedule = from_diffusers(scheduler, mu=mu)
    assert isinstance(schedule, FlowSchedule)
    return replace(schedule, handed=handed)


def _of_student(source: Source, scheduler: Any, sampler: str, steps: int, handed: bool) -> FlowSchedule:
    """Raises UserError where the stock pipeline would draw other images than the card says."""
    place, said, kind = source.card_path, source.card.get("sampler", "ddim"), type(scheduler).__name__
    if kind not in SUPPORTED:
        raise UserError(
            f"{place} describes a student, and its scheduler is {a_or_an(kind)}; it takes a {FLOW}"
        )
    if said != sampler:
        raise UserError(
            f"{place} describes a student drawn by {said}, and its scheduler_config.json has "
            f"stochastic_sampling {scheduler.config.get('stochastic_sampling', False)}, with which the stock "
            f"pipeline draws other images; repair one of them"
        )
    if scheduler.config.get("use_dynamic_shifting"):
        raise UserError(
            f"{place} describes a student, and its scheduler_config.json has use_dynamic_shifting; it takes "
            "the shift of the student's own size"
        )
    if not 1 <= steps <= scheduler.config.num_train_timesteps:
        raise UserError(f"{place} has steps {steps}; use 1 to {scheduler.config.num_train_timesteps}")
    law = flow_schedulers.read_shift(scheduler, steps, handed=handed)
    schedule = FlowSchedule(law, scheduler.config.num_train_timesteps, handed)
    schedule.check_steps(steps, sampler)
    return schedule


def stock(source: Source, denoiser: Any) -> Any:
    """The scheduler of a saved pipeline. Of a model that was not distilled it is that of its teacher, as it
    is."""
    if denoiser.steps is None and denoiser.prediction == "flow":
        kind, config = source.scheduler()
        return schedulers.built(kind, config, SUPPORTED)
    return flow_schedulers.to_flow_diffusers(
        denoiser.schedule, denoiser.prediction, denoiser.sampler, steps=denoiser.steps
    )
