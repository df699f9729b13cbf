"""Unconditional latent diffusion: a UNet2DModel on a VQModel's latents, in and out of LDMPipeline.

Rombach et al. 2022. Latents are those before they are quantised; the decoder quantises them first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import to_diffusers
from diffkd.errors import UserError
from diffkd.io.files import write_json
from diffkd.io.text import quoted
from diffkd.models import components, networks, schedulers, unets
from diffkd.models.codecs import Autoencoder
from diffkd.models.pipeline_files import INDEX, STEM
from diffkd.models.source import Source
from diffkd.models.unet import to_stock

PIPELINES = ("LDMPipeline",)
NETWORK = UNet2DModel
CALL: dict[str, Any] = {}
LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv",
    "upsamplers.0.conv",
)  # fmt: skip
GLOBAL_NOISE = True
LATENT = True
VQVAE = "vqvae"
COPIED = {VQVAE: STEM}


def load(source: Source) -> Denoiser:
    """A pipeline as a Denoiser in float32 (see `Family.load`). Its autoencoder is checked, and read when it
    is first used."""
    components.check(source, "unet", COPIED)
    _check_config(networks.config_of(source.place_of("unet"), UNet2DModel), source.name)
    network = unets.read(source)
    unets.check_card(None, source)
    side = network.config.sample_size
    sampling = schedulers.read(source)
    codec = Autoencoder(source, only=(side, side), normalised=False, kinds=("VQModel",), component=VQVAE)
    codec.check_channels(network.config.in_channels)
    return Denoiser(
        network,
        sampling.schedule,
        sampling.prediction,
        clip=sampling.clip,
        steps=source.card.get("steps"),
        sampler=sampling.sampler,
        codec=codec,
    )


def _check_config(config: Any, name: str) -> None:
    """Raises UserError for a network that LDMPipeline does not draw: it gives no labels, and its latents are
    squares of the one size that the config has."""
    networks.check_supported(config, name, {"num_class_embeds": (None,), "class_embed_type": (None,)})
    side = config["sample_size"]
    if not (type(side) is int and side > 0):
        raise UserError(
            f"{name} has sample_size {quoted(side)}, and an {PIPELINES[0]} draws latents of one side; "
            "supported is a positive integer"
        )


def save(denoiser: Denoiser, folder: Path) -> None:
    """The teacher's pipeline with another network and scheduler; the autoencoder is copied."""
    network: Any = denoiser.network
    networks.check_saved(network)
    if network.dtype != torch.float32:
        raise UserError(
            f"an {PIPELINES[0]} draws its noise in float32, which a network in {network.dtype} does not "
            "take; save in float32"
        )
    codec = denoiser.codec
    if not isinstance(codec, Autoencoder):
        raise UserError(f"an {PIPELINES[0]} is saved with the autoencoder of its teacher; load it from there")
    folder.mkdir(parents=True, exist_ok=True)
    to_stock(network).save_pretrained(folder / "unet", safe_serialization=True)
    scheduler = to_diffusers(denoiser.schedule, denoiser.prediction, denoiser.clip, denoiser.sampler)
    scheduler.save_pretrained(folder / "scheduler")
    components.copy(codec.source, COPIED, folder, network.dtype)
    changed = {"scheduler": ["diffusers", type(scheduler).__name__]}
    write_json(folder / INDEX, {**codec.source.index, **changed})
