"""What pipelines of transformers share: what fits together, the size of images, how students are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from diffkd.core.denoiser import Denoiser
from diffkd.core.noise_schedule import Schedule
from diffkd.errors import UserError
from diffkd.io.files import write_json
from diffkd.io.text import a_or_an, quoted
from diffkd.models import components, flow_schedulers, networks
from diffkd.models.codecs import Autoencoder
from diffkd.models.components import Copied
from diffkd.models.pipeline_files import INDEX
from diffkd.models.prompts import Prompts
from diffkd.models.source import Source

THOUSAND = 1000  # T, by which these pipelines divide the time of their schedulers


def config_of(source: Source, kind: type, copied: Copied) -> dict[str, Any]:
    """The config of a pipeline's transformer, of this class. copied: its other components.

    Raises UserError for a network without its pipeline, another kind of network, or components that a
    student cannot have from its teacher.
    """
    if source.network is not None:
        raise UserError(
            f"{source.name} is {a_or_an(kind.__name__)} alone, without its text encoders and its "
            "autoencoder; give the folder of their pipeline"
        )
    components.check(source, "transformer", copied)
    networks.check_kind(source, "transformer", kind)
    return networks.config_of(source.place_of("transformer"), kind)


def shape_of(source: Source, codec: Autoencoder, default: tuple[int, int]) -> tuple[int, int, int]:
    """(C, H, W) of the latents of an image that a model draws where no size is asked for: what the card of a
    student calls its pipeline with, else the default height and width of latents."""
    call = source.card.get("call", {})
    height, width = (
        call.get(key, side * codec.factor) for key, side in zip(("height", "width"), default, strict=True)
    )
    if not all(type(side) is int and side > 0 for side in (height, width)):
        raise UserError(f"{source.card_path} has call {quoted(call)}, of no size of images; repair it")
    return codec.shape(height, width)


def check_width(source: Source, conditioner: Prompts, taken: int) -> None:
    """Raises UserError where a network takes embeddings of another width than the text encoder's."""
    width = conditioner.example["encoder_hidden_states"].shape[-1]
    if width != taken:
        raise UserError(
            f"{source.name} has a text encoder of width {width}, and its network takes {taken}; are they of "
            "one model?"
        )


def check_factor(codec: Autoencoder, needed: int) -> None:
    """Raises UserError for an autoencoder of another scale than the stock pipeline takes for granted."""
    if codec.factor != needed:
        raise UserError(
            f"{codec.name} has an autoencoder of {codec.factor} pixels a side to a latent, and its pipeline "
            f"works with {needed}; are they of one model?"
        )


def denoiser_of(
    source: Source,
    network: nn.Module,
    sampling: flow_schedulers.Sampling,
    shape: tuple[int, int, int],
    codec: Autoencoder,
    conditioner: Prompts,
    **of_family: Any,
) -> Denoiser:
    """A transformer of a flow as a Denoiser. of_family: the other arguments, `call` among them."""
    return Denoiser(
        network,
        sampling.schedule,
        "flow",
        shape=shape,
        steps=source.card.get("steps"),
        sampler=sampling.sampler,
        schedule_of=sampling.schedule_of,
        example=conditioner.example,
        codec=codec,
        conditioner=conditioner,
        **of_family,
    )


def check_thousand(source: Source, schedule: Schedule) -> None:
    """Raises UserError for a scheduler of another number of time steps than these pipelines divide by."""
    if schedule.num_train_timesteps != THOUSAND:
        raise UserError(
            f"{source.name} has a scheduler with num_train_timesteps {schedule.num_train_timesteps}, and its "
            f"pipeline takes the noise level for time / {THOUSAND}; set it to {THOUSAND}"
        )


def save(denoiser: Denoiser, folder: Path, kind: type, copied: Copied, scheduler: Any = None) -> None:
    """The teacher's pipeline with another transformer, of this class, and scheduler; all else is copied.

    scheduler: of a student, None for that of a flow.
    """
    network: Any = denoiser.network
    networks.check_saved(network)
    source = _source_of(denoiser)
    folder.mkdir(parents=True, exist_ok=True)
    network.save_pretrained(folder / "transformer", safe_serialization=True)
    scheduler = scheduler_of(denoiser) if scheduler is None else scheduler
    scheduler.save_pretrained(folder / "scheduler")
    components.copy(source, copied, folder, network.dtype)
    name = type(scheduler).__name__
    changed = {"transformer": ["diffusers", kind.__name__], "scheduler": ["diffusers", name]}
    write_json(folder / INDEX, {**source.index, **changed})


def scheduler_of(denoiser: Denoiser) -> Any:
    """The stock scheduler that draws a model of a flow."""
    return flow_schedulers.stock(_source_of(denoiser), denoiser)


def _source_of(denoiser: Denoiser) -> Source:
    if not isinstance(denoiser.codec, Autoencoder):
        raise UserError(
            f"{a_or_an(type(denoiser.network).__name__)} is saved with the pipeline that it was loaded from; "
            "load it from there"
        )
    return denoiser.codec.source
