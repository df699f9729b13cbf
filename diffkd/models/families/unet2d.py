"""Pixel-space UNets: UNet2DModel with or without classes, read from and written to stock pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ConsistencyModelPipeline, DDIMPipeline, DDPMPipeline, UNet2DModel

from diffkd.core.denoiser import Denoiser
from diffkd.core.denoiser import call as plain
from diffkd.core.schedules import to_diffusers
from diffkd.errors import UserError
from diffkd.io.text import quoted
from diffkd.models import networks, preconditioned, schedulers, unets
from diffkd.models.source import Source
from diffkd.models.unet import to_stock

PIPELINES = ("DDPMPipeline", "DDIMPipeline", "ConsistencyModelPipeline")
NETWORK = UNet2DModel
CALL: dict[str, Any] = {}
LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv",
    "upsamplers.0.conv",
)  # fmt: skip
LATENT = False


def load(source: Source) -> Denoiser:
    """A pipeline, or a UNet alone, as a Denoiser in float32 (see `Family.load`)."""
    network = unets.read(source)
    unets.check_card(network.config.num_class_embeds, source)
    sampling = _sampling(source)
    if sampling.call is not plain:
        _check_square(network.config, source.name)
    return Denoiser(
        network,
        sampling.schedule,
        sampling.prediction,
        num_classes=source.card.get("num_classes", network.config.num_class_embeds),
        null_label=source.card.get("null_label"),
        clip=sampling.clip,
        steps=source.card.get("steps"),
        sampler=sampling.sampler,
        call=sampling.call,
    )


def _sampling(source: Source) -> schedulers.Sampling:
    if preconditioned.is_read(source):
        return preconditioned.read(source)
    # a DDIMPipeline makes a DDIMScheduler of whatever its folder has
    ddim = "DDIMScheduler" if source.index.get("_class_name") == "DDIMPipeline" else None
    return schedulers.read(source, converted_to=ddim)


def _check_square(config: Any, name: str) -> None:
    """Raises UserError for a network of images that ConsistencyModelPipeline does not draw."""
    if config.sample_size is not None and type(config.sample_size) is not int:
        raise UserError(
            f"{name} has sample_size {quoted(config.sample_size)}, and {preconditioned.PIPELINE} draws "
            "squares alone, by one number; give it one side"
        )


def save(denoiser: Denoiser, folder: Path) -> None:
    """A pipeline that draws with the denoiser's own sampler: a ConsistencyModelPipeline, whose call takes
    `class_labels`, for classes, and for networks that are preconditioned, as it alone scales what they are
    given; else a DDIMPipeline, or a DDPMPipeline for renoise, as DDIMPipeline would replace its scheduler."""
    network: Any = denoiser.network
    networks.check_saved(network)
    if next(network.parameters()).dtype not in (torch.float32, torch.float16):
        raise UserError("stock pixel pipelines cannot make images in bfloat16; save in float32 or float16")
    pipeline: Any = DDPMPipeline if denoiser.sampler == "renoise" else DDIMPipeline
    if preconditioned.is_written(denoiser):
        pipeline, scheduler = ConsistencyModelPipeline, preconditioned.write(denoiser)
    else:
        scheduler = to_diffusers(denoiser.schedule, denoiser.prediction, denoiser.clip, denoiser.sampler)
    if network.config.num_class_embeds is not None:
        pipeline = ConsistencyModelPipeline
    pipeline(unet=to_stock(network), scheduler=scheduler).save_pretrained(folder, safe_serialization=True)
