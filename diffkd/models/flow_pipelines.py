"""What pipelines of transformers on flows share: the size of their images, and how students are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.io.files import write_json
from diffkd.io.text import quoted
from diffkd.models import components, flow_schedulers, networks
from diffkd.models.codecs import Autoencoder
from diffkd.models.components import Copied
from diffkd.models.pipeline_files import INDEX
from diffkd.models.source import CARD, Source


def check_whole(source: Source, kind: str) -> None:
    """Raises UserError for a network of this kind without its pipeline."""
    if source.network is not None:
        raise UserError(
            f"{source.name} is a {kind} alone, without its text encoders and its autoencoder; give the "
            "folder of their pipeline"
        )


def shape_of(source: Source, codec: Autoencoder, default: tuple[int, int]) -> tuple[int, int, int]:
    """(C, H, W) of the latents of an image that a model draws where no size is asked for: what the card of a
    student calls its pipeline with, else the default height and width of latents."""
    call = source.card.get("call", {})
    height, width = (
        call.get(key, side * codec.factor) for key, side in zip(("height", "width"), default, strict=True)
    )
    if not all(type(side) is int and side > 0 for side in (height, width)):
        raise UserError(f"{source.folder / CARD} has call {quoted(call)}, of no size of images; repair it")
    return codec.shape(height, width)


def save(denoiser: Denoiser, folder: Path, kind: type, copied: Copied) -> None:
    """The teacher's pipeline with another transformer, of this class, and scheduler; all else is copied."""
    network: Any = denoiser.network
    networks.check_saved(network)
    if not isinstance(denoiser.codec, Autoencoder):
        raise UserError(
            f"a {kind.__name__} is saved with the pipeline that it was loaded from; load it from there"
        )
    source = denoiser.codec.source
    folder.mkdir(parents=True, exist_ok=True)
    network.save_pretrained(folder / "transformer", safe_serialization=True)
    scheduler = flow_schedulers.write(source, denoiser, folder / "scheduler")
    components.copy(source, copied, folder, network.dtype)
    changed = {"transformer": ["diffusers", kind.__name__], "scheduler": ["diffusers", scheduler]}
    write_json(folder / INDEX, {**source.index, **changed})
