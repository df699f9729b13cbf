"""Networks of NVlabs' EDM that are of no stock class: scripts/convert_edm.py makes them of their pickles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.models import networks, preconditioned
from diffkd.models.song_unet import SongUNet
from diffkd.models.source import Source

PIPELINES: tuple[str, ...] = ()  # stock diffusers has none for it
NETWORK = SongUNet
CALL: dict[str, Any] = {}
LORA_TARGETS = ("qkv", "proj", "conv1")


def load(source: Source) -> Denoiser:
    """A network and its scheduler in one folder as a Denoiser in float32 (see `Family.load`)."""
    network = networks.read(source, "unet", SongUNet)
    networks.check_sample_size(network.config, source.name)
    if not preconditioned.is_read(source):
        raise UserError(
            f"{source.name} is a SongUNet with {source.scheduler()[0]}; it is preconditioned, as "
            "EDMEulerScheduler says"
        )
    sampling = preconditioned.read(source)
    return Denoiser(
        network,
        sampling.schedule,
        sampling.prediction,
        num_classes=network.config.num_class_embeds,
        clip=sampling.clip,
        steps=source.card.get("steps"),
        sampler=sampling.sampler,
        call=sampling.call,
    )


def save(denoiser: Denoiser, folder: Path) -> None:
    """The network and its scheduler, side by side, as the conversion leaves them."""
    network: Any = denoiser.network
    networks.check_saved(network)
    scheduler = preconditioned.write(denoiser)
    network.save_pretrained(folder, safe_serialization=True)
    scheduler.save_pretrained(folder)
