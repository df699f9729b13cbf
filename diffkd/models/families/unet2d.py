"""Pixel-space UNets: UNet2DModel with or without classes, read from and written to stock pipelines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import ConsistencyModelPipeline, DDIMPipeline, DDPMPipeline, UNet2DModel

from diffkd.core.denoiser import Denoiser
from diffkd.core.denoiser import call as plain
from diffkd.core.schedules import to_diffusers
from diffkd.errors import UserError
from diffkd.io.text import quoted
from diffkd.models import networks, preconditioned, schedulers
from diffkd.models.source import CARD, Source
from diffkd.models.unet import to_fast, to_stock

PIPELINES = ("DDPMPipeline", "DDIMPipeline", "ConsistencyModelPipeline")
NETWORK = UNet2DModel
CALL: dict[str, Any] = {}


def load(source: Source) -> Denoiser:
    """A pipeline, or a UNet alone, as a Denoiser in float32 (see `Family.load`)."""
    network = networks.read(source, "unet", UNet2DModel, _check_memory)
    _check_config(network.config, source.name)
    _check_classes(network.config.num_class_embeds, source)
    network = to_fast(_without_variance(network))
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


def _without_variance(network: UNet2DModel) -> UNet2DModel:
    """The network without the learned variance, the second half of its output: no student is drawn with one,
    and of the stock schedulers only DDPMScheduler takes it."""
    channels = network.config.in_channels
    if network.config.out_channels != channels:
        whole = network.conv_out
        with torch.device("meta"):
            network.conv_out = torch.nn.Conv2d(
                whole.in_channels, channels, whole.kernel_size, padding=whole.padding
            )
        for key, value in whole.named_parameters():
            setattr(network.conv_out, key, torch.nn.Parameter(value.detach()[:channels].clone()))
        network.register_to_config(out_channels=channels)
    return network


def _check_memory(config: dict[str, Any], name: str) -> None:
    """Raises UserError where one image is more than this machine can hold: the states that the first
    resolution keeps for the way up are the largest, and there are at least two more of them."""
    size, widths = config.get("sample_size"), config.get("block_out_channels")
    sides = [size, size] if type(size) is int else size
    if not isinstance(sides, list) or not isinstance(widths, list) or not widths:
        return  # says `_check_config`
    kept = 3 + config.get("layers_per_block", 2)
    needed = math.prod(sides) * widths[0] * kept * 4
    if needed > psutil.virtual_memory().total:
        raise UserError(
            f"{name} has sample_size {quoted(size)} and {widths[0]} channels, of which one image needs "
            f"{needed / 2**30:.0f} GiB, more than this machine has; repair its config.json"
        )


def _check_classes(embeddings: int | None, source: Source) -> None:
    """Raises UserError for a card that promises labels that the network has not."""
    for key, most in (("num_classes", embeddings), ("null_label", (embeddings or 0) - 1)):
        value = source.card.get(key)
        if value is not None and (embeddings is None or value > (most or 0)):
            raise UserError(
                f"{source.folder / CARD} has {key} {value}, and the network has {embeddings or 'no'} class "
                "embeddings; repair it"
            )


def _check_config(config: Any, name: str) -> None:
    """Raises UserError for a network that `Denoiser` does not describe."""
    networks.check_supported(
        config, name, {"time_embedding_type": ("positional",), "class_embed_type": (None, "timestep")}
    )
    if config.class_embed_type is not None and config.num_class_embeds is None:
        raise UserError(
            f"{name} has class_embed_type {config.class_embed_type} and no num_class_embeds, without which "
            "stock pipelines give it no labels; name how many classes it has in its config.json"
        )
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise UserError(
            f"{name} has in_channels {config.in_channels} and out_channels {config.out_channels}; supported "
            "are as many, or twice as many for a learned variance"
        )
    networks.check_sample_size(config, name)


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
