"""Networks of NVlabs' EDM2 (Karras et al. 2024), of pixels or of latents, which are of no stock class:
scripts/convert_edm.py makes them of their pickles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.models import components, networks, preconditioned
from diffkd.models.codecs import Autoencoder
from diffkd.models.edm2_unet import EDM2UNet
from diffkd.models.pipeline_files import STEM
from diffkd.models.source import Source

PIPELINES: tuple[str, ...] = ()  # stock diffusers has none for it
NETWORK = EDM2UNet
CALL: dict[str, Any] = {}
LORA_TARGETS = ("attn_qkv", "attn_proj", "conv_res1")
VAE = "vae"
OF_IMAGES = (1, 3)  # channels


def load(source: Source) -> Denoiser:
    """A network and its scheduler in one folder, and of latents an autoencoder in a folder there, as a
    Denoiser in float32 (see `Family.load`)."""
    network = networks.read(source, "unet", EDM2UNet)
    return preconditioned.denoiser(source, network, _codec(source, network.config))


def _codec(source: Source, config: Any) -> Autoencoder | None:
    """Raises UserError for latents without an autoencoder, and for one of others."""
    if not (source.folder / VAE).is_dir():
        if config.in_channels in OF_IMAGES:
            return None
        raise UserError(
            f"{source.name} is an EDM2UNet of {config.in_channels} channels, which are latents, without its "
            f"autoencoder in a folder {VAE}; convert its pickle with one (scripts/convert_edm.py)"
        )
    side = config.sample_size
    named = replace(source, index={VAE: ["diffusers", "AutoencoderKL"]})
    codec = Autoencoder(named, only=(side, side), kinds=("AutoencoderKL",), unit=True)
    codec.check_channels(config.in_channels)
    return codec


def save(denoiser: Denoiser, folder: Path) -> None:
    """The network and its scheduler, side by side, and a copy of the autoencoder."""
    preconditioned.save(denoiser, folder)
    if isinstance(denoiser.codec, Autoencoder):
        components.copy(denoiser.codec.source, {VAE: STEM}, folder, denoiser.dtype)
