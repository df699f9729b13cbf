"""A pipeline's noise scheduler, read for a Denoiser: the same for every family."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import diffusers

from diffkd.core.denoiser import Call, StockSampler
from diffkd.core.denoiser import call as plain
from diffkd.core.scheduler_config import FIELDS, SCHEDULERS, clip_of
from diffkd.core.schedules import Schedule, from_betas
from diffkd.errors import UserError
from diffkd.io.text import a_or_an, log, quoted, reason
from diffkd.models import validation
from diffkd.models.source import Source

LEGACY = frozenset({"tensor_format", "timestep_values"})  # of diffusers before 0.5, which mean nothing


class Sampling(NamedTuple):
    """What a Denoiser takes from a scheduler, and the sampler of ours that stands for its own."""

    schedule: Schedule
    prediction: str
    clip: float | None
    sampler: StockSampler
    call: Call = plain


def read(source: Source, *, converted_to: str | None = None) -> Sampling:
    """converted_to: the class that the pipeline replaces any scheduler by.

    Raises UserError for a scheduler that the samplers cannot stand for, and for a student's that does not
    draw it as its card says.
    """
    kind, config = checked(source, FIELDS)
    with readable(source):
        scheduler = built(kind, config)
        if converted_to is not None:
            scheduler = built(converted_to, scheduler.config)
        schedule, clip = from_betas(scheduler), clip_of(scheduler)
    if not ((schedule.alphas_cumprod >= 0) & (schedule.alphas_cumprod <= 1)).all():
        raise UserError(
            f"{source.name} has a scheduler whose noise levels are out of range; repair its betas"
        )
    sampler: StockSampler = "renoise" if isinstance(scheduler, diffusers.LCMScheduler) else "ddim"
    _check_card(source, schedule, sampler, scheduler)
    return Sampling(schedule, scheduler.config.prediction_type, clip, sampler)


def checked(source: Source, fields: Collection[str]) -> tuple[str, dict[str, Any]]:
    """The class name and the config of a model's scheduler; a line for each field that is not among these."""
    kind, config = source.scheduler()
    validation.check_scheduler(config, source.name)
    for key in sorted(config.keys() - fields - LEGACY):
        if not key.startswith("_") and config[key] not in (None, False):
            log.warning(
                "%s has a scheduler with %s %s, which is not known and ignored", source.name, quoted(key),
                quoted(config[key]),
            )  # fmt: skip
    return kind, config


@contextmanager
def readable(source: Source) -> Iterator[None]:
    """Raises UserError, with the model's name, where its scheduler cannot be built or read."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source.name}: {error}") from error
    except Exception as error:  # diffusers raises many types for invalid values
        raise UserError(
            f"{source.name} has a scheduler that diffusers cannot build ({reason(error)}); repair its config"
        ) from error


def built(kind: str, config: Any, supported: Sequence[str] = SCHEDULERS) -> Any:
    """The scheduler of this class. Raises UserError for one that the installed diffusers does not have."""
    scheduler_class = getattr(diffusers, kind, None) if kind.endswith("Scheduler") else None
    if scheduler_class is None:
        raise UserError(
            f"scheduler {quoted(kind)} is not one that the installed diffusers provides; supported are "
            f"{', '.join(supported)}"
        )
    return scheduler_class.from_config(config)


def check_total(source: Source, schedule: Schedule) -> None:
    """Raises UserError where a card and its scheduler have other numbers of time steps."""
    total = source.card.get("num_train_timesteps")
    if total not in (None, schedule.num_train_timesteps):
        raise UserError(
            f"{source.card_path} has num_train_timesteps {total}, and the scheduler "
            f"{schedule.num_train_timesteps}; repair one of them"
        )


def _check_card(source: Source, schedule: Schedule, sampler: str, scheduler: Any) -> None:
    """Raises UserError where a card promises what the scheduler does not keep."""
    card, place = source.card, source.card_path
    check_card_steps(source, schedule, sampler)
    if card.get("steps") is None:
        return
    said = card.get("sampler", "ddim")
    options = (
        {"timestep_spacing": "trailing", "set_alpha_to_one": True}
        if said == "ddim"
        else {"original_inference_steps": schedule.num_train_timesteps}
    )
    own = "LCMScheduler" if said == "renoise" else "DDIMScheduler"
    wrong = [key for key, value in options.items() if scheduler.config.get(key) != value]
    if type(scheduler).__name__ != own or wrong:
        found = f"{wrong[0]} {quoted(scheduler.config.get(wrong[0]))}" if wrong else type(scheduler).__name__
        raise UserError(
            f"{place} describes a student drawn by {said}, and its scheduler_config.json has {found}, with "
            f"which the stock pipeline draws other images; it takes {a_or_an(own)} with "
            f"{', '.join(f'{key} {value}' for key, value in options.items())}"
        )


def check_card_steps(source: Source, schedule: Schedule, sampler: str) -> None:
    """Raises UserError where a card has other time steps than the schedule, or steps that it lacks."""
    check_total(source, schedule)
    steps = source.card.get("steps")
    if steps is None:
        return
    try:
        schedule.check_steps(steps, sampler)
    except UserError as error:
        raise UserError(f"{source.card_path}: {error}") from error
