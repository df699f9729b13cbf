"""Schedulers of networks that are preconditioned, of EDM's kind: read for a Denoiser, and written for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffkd.core.conditioning import Codec
from diffkd.core.denoiser import Denoiser, StockSampler
from diffkd.core.scheduler_config import PRECONDITIONED
from diffkd.core.schedules import ConsistencySchedule, EDMSchedule, Preconditioned, from_diffusers
from diffkd.errors import UserError
from diffkd.io.text import a_or_an, quoted
from diffkd.models import networks, schedulers
from diffkd.models.schedulers import Sampling
from diffkd.models.source import Source

PIPELINE = "ConsistencyModelPipeline"  # the one that scales inputs and first noise as these schedulers say


def is_read(source: Source) -> bool:
    """Whether the scheduler of this source is of that kind, and its pipeline goes by it."""
    kind, _ = source.scheduler()
    if kind not in PRECONDITIONED or source.index.get("_class_name") == "DDIMPipeline":
        return False  # which makes a DDIMScheduler of any
    if source.network is None and (pipeline := source.index.get("_class_name")) != PIPELINE:
        raise UserError(
            f"{source.name} is {a_or_an(str(pipeline))} with {kind}, for whose inputs it has no scale; the "
            f"pipeline that draws these networks is {PIPELINE}: name it as _class_name in model_index.json"
        )
    return True


def read(source: Source) -> Sampling:
    """What a Denoiser takes from such a scheduler: on EDM's own path, or from sigma_min on, as consistency
    models are.

    An EDM student has the grid of its own steps in its scheduler; it is given the schedule that this is an
    even grid of. Raises UserError as `schedulers.read` does.
    """
    kind, _ = source.scheduler()
    kind, config = schedulers.checked(source, PRECONDITIONED[kind])
    with schedulers.readable(source):
        scheduler = schedulers.built(kind, config, tuple(PRECONDITIONED))
        schedule = from_diffusers(scheduler)
    own: StockSampler = "ddim" if isinstance(schedule, EDMSchedule) else "renoise"
    sampler = _sampler(source, scheduler, own)
    if isinstance(schedule, EDMSchedule):
        schedule = _extended(source, schedule)
    schedulers.check_card_steps(source, schedule, sampler)
    negated = scheduler.config.get("prediction_type") == "v_prediction"
    clip = 1.0 if scheduler.config.get("clip_denoised") else None
    assert isinstance(schedule, EDMSchedule | ConsistencySchedule)
    return Sampling(schedule, "sample", clip, sampler, Preconditioned(schedule, negated))


def _extended(source: Source, schedule: EDMSchedule) -> EDMSchedule:
    try:
        return schedule.extended(source.card.get("steps") or 1)
    except UserError as error:
        raise UserError(f"{source.name}: {error}") from error


def _sampler(source: Source, scheduler: Any, own: StockSampler) -> StockSampler:
    """The sampler that a model is drawn by: of one step as its card says, as both are the same.

    Raises UserError for a student whose scheduler draws by another, or leaves noise.
    """
    said, steps = source.card.get("sampler", own), source.card.get("steps")
    last = scheduler.config.get("final_sigmas_type", "zero")
    if steps is not None and last != "zero":
        raise UserError(
            f"{source.card_path} describes a student, and its scheduler_config.json has "
            f"final_sigmas_type {quoted(last)}, with which stock leaves noise in its images; set it to zero"
        )
    if steps == 1:
        return "renoise" if said == "renoise" else "ddim"
    if steps is not None and said != own:
        raise UserError(
            f"{source.card_path} describes a student drawn by {said}, and its {type(scheduler).__name__} "
            f"draws by {own}; repair one of them"
        )
    return own


def denoiser(source: Source, network: Any, codec: Codec | None = None) -> Denoiser:
    """Of a network that is of no stock class, beside its scheduler in one folder. Raises UserError where that
    says no preconditioning."""
    networks.check_sample_size(network.config, source.name)
    if not is_read(source):
        raise UserError(
            f"{source.name} is {a_or_an(type(network).__name__)} with {source.scheduler()[0]}; it is "
            "preconditioned, as EDMEulerScheduler says"
        )
    sampling = read(source)
    return Denoiser(
        network,
        sampling.schedule,
        sampling.prediction,
        num_classes=network.config.num_class_embeds,
        clip=sampling.clip,
        steps=source.card.get("steps"),
        sampler=sampling.sampler,
        call=sampling.call,
        codec=codec,
    )


def save(denoiser: Denoiser, folder: Path) -> None:
    """The inverse: the network and its scheduler, side by side."""
    network: Any = denoiser.network
    networks.check_saved(network)
    scheduler = write(denoiser)
    network.save_pretrained(folder, safe_serialization=True)
    scheduler.save_pretrained(folder)


def is_written(denoiser: Denoiser) -> bool:
    """Whether the scheduler of this denoiser is of that kind."""
    return isinstance(denoiser.call, Preconditioned)


def write(denoiser: Denoiser) -> Any:
    """The stock scheduler that draws the same images from a preconditioned network in its own steps.

    Raises UserError for a sampler or a bound that it does not have.
    """
    from diffusers import CMStochasticIterativeScheduler, EDMEulerScheduler

    schedule, call, steps, clip = denoiser.schedule, denoiser.call, denoiser.steps, denoiser.clip
    assert isinstance(call, Preconditioned)
    if steps is not None:
        schedule.check_steps(steps, denoiser.sampler)
    if isinstance(schedule, ConsistencySchedule):
        _check_clip(clip, (None, 1.0), "CMStochasticIterativeScheduler")
        return CMStochasticIterativeScheduler(**_fields(schedule.edm), clip_denoised=clip is not None)
    assert isinstance(schedule, EDMSchedule)
    _check_clip(clip, (None,), "EDMEulerScheduler")
    prediction = "v_prediction" if call.negated else "epsilon"
    return EDMEulerScheduler(**_fields(schedule.shortened(steps or 1)), prediction_type=prediction)


def _fields(edm: EDMSchedule) -> dict[str, Any]:
    names = ("sigma_min", "sigma_max", "sigma_data", "rho", "num_train_timesteps")
    return {name: getattr(edm, name) for name in names}


def _check_clip(clip: float | None, can: tuple[float | None, ...], kind: str) -> None:
    if clip not in can:
        raise UserError(f"{kind} does not bound x0 by {clip:g}; set the model's clip to {can[-1]}")
