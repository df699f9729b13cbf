"""Pixel-space UNets: UNet2DModel with or without classes, read from and written to stock pipelines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ConsistencyModelPipeline, DDIMPipeline, DDPMPipeline, UNet2DModel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import PREDICTIONS, Schedule, from_diffusers, to_diffusers
from diffkd.errors import UserError
from diffkd.io.text import quoted, reason
from diffkd.models import validation
from diffkd.models.unet import to_fast, to_stock

PIPELINES = ("DDPMPipeline", "DDIMPipeline", "ConsistencyModelPipeline")
NETWORK = UNet2DModel
CLIPPING_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "LCMScheduler")  # others do not bound x0


def load(folder: Path, index: dict[str, Any], name: str, card: dict[str, Any]) -> Denoiser:
    """The pipeline in `folder` as a Denoiser in float32 (see `Family.load`)."""
    entry = index.get("unet")
    if not isinstance(entry, list) or entry[-1:] != ["UNet2DModel"]:
        raise UserError(
            f"{name} has a network of type {quoted(entry)}, which is not supported; supported is UNet2DModel"
        )
    network = _network(folder, name)
    scheduler = _scheduler_config(folder, name)
    return Denoiser(
        network,
        _schedule(scheduler, name),
        _prediction(scheduler, name),
        num_classes=card.get("num_classes", network.config.num_class_embeds),
        null_label=card.get("null_label"),
        clip=_clip(scheduler, name),
        steps=card.get("steps"),
        sampler=card.get("sampler", "ddim"),
    )


def _network(folder: Path, name: str) -> UNet2DModel:
    """The UNet of a pipeline: in its `unet` folder, or at the root as in early repositories."""
    place = folder / "unet" if (folder / "unet").is_dir() else folder
    validation.check_weights(place, name)
    try:
        validation.check_network(UNet2DModel, place, name)
        network, loading = UNet2DModel.from_pretrained(
            place, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:  # diffusers raises many types for an invalid config
        why = " ".join(str(error).split())[:300].removesuffix("; is it complete?")
        raise UserError(f"{name}: the network in {place} cannot be read ({why}); is it complete?") from error
    if loading["missing_keys"]:
        raise UserError(
            f"{name}: the weights in {place} lack {loading['missing_keys'][0]}; are they complete?"
        )
    _check_config(network.config, name)
    return to_fast(network)


def _check_config(config: Any, name: str) -> None:
    """Raises UserError for a network that `Denoiser` does not describe."""
    if config.time_embedding_type != "positional":
        raise UserError(
            f"{name} has time_embedding_type {config.time_embedding_type!r}, which is not supported; "
            "supported is positional"
        )
    if config.out_channels != config.in_channels:
        raise UserError(
            f"{name} has out_channels {config.out_channels} and in_channels {config.in_channels}, perhaps "
            "for a learned variance; supported are networks that predict the image alone"
        )
    size = config.sample_size
    sides = (size, size) if type(size) is int else size
    if size is not None and not (
        isinstance(sides, tuple | list)
        and len(sides) == 2
        and all(type(side) is int and side > 0 for side in sides)
    ):
        raise UserError(
            f"{name} has sample_size {quoted(size)}; supported is a positive integer, or height and width"
        )


def _scheduler_config(folder: Path, name: str) -> dict[str, Any]:
    for place in (folder / "scheduler", folder):
        if (place / "scheduler_config.json").is_file():
            config = validation.read_object(place / "scheduler_config.json")
            validation.check_scheduler(config, name)
            return config
    raise UserError(f"{name} has no scheduler_config.json; save the pipeline with save_pretrained")


def _prediction(config: Mapping[str, Any], name: str) -> str:
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise UserError(
            f"{name} has prediction_type {quoted(prediction)}; supported are {', '.join(PREDICTIONS[:3])}"
        )
    return str(prediction)


def _clip(config: Mapping[str, Any], name: str) -> float | None:
    """The scheduler's bound on x0, None for none."""
    kind = config.get("_class_name")
    if not config.get("clip_sample", kind != "LCMScheduler"):
        return None
    clip = config.get("clip_sample_range", 1.0)
    if clip is not None and not (type(clip) in (int, float) and 0 < clip < math.inf):
        raise UserError(f"{name} has clip_sample_range {quoted(clip)}; supported is a number above 0")
    return clip if kind in CLIPPING_SCHEDULERS else None


def _schedule(config: Mapping[str, Any], name: str) -> Schedule:
    kind = str(config.get("_class_name", "DDPMScheduler"))
    scheduler_class = getattr(diffusers, kind, None) if kind.endswith("Scheduler") else None
    if scheduler_class is None:
        raise UserError(
            f"{name} has scheduler {kind!r}, which diffusers does not provide; use DDPMScheduler or "
            "DDIMScheduler"
        )
    try:
        schedule = from_diffusers(scheduler_class.from_config(config))
    except UserError:
        raise
    except Exception as error:  # diffusers raises many types for invalid values
        raise UserError(
            f"{name} has a scheduler that diffusers cannot build ({reason(error)}); repair its config"
        ) from error
    if not ((schedule.alphas_cumprod >= 0) & (schedule.alphas_cumprod <= 1)).all():
        raise UserError(f"{name} has a scheduler whose noise levels are out of range; repair its betas")
    return schedule


def save(denoiser: Denoiser, folder: Path) -> None:
    """A pipeline that draws with the denoiser's own sampler: a ConsistencyModelPipeline, whose call takes
    `class_labels`, for classes; else a DDIMPipeline, or a DDPMPipeline for renoise, as DDIMPipeline would
    replace its scheduler."""
    network: Any = denoiser.network
    if any(map(is_traceable_wrapper_subclass, network.parameters())):
        raise UserError("a stock pipeline cannot hold 8-bit weights; save the model loaded without quantize")
    if next(network.parameters()).dtype not in (torch.float32, torch.float16):
        raise UserError("stock pixel pipelines cannot make images in bfloat16; save in float32 or float16")
    network.to(memory_format=torch.contiguous_format)  # safetensors needs it, and on a GPU it is another
    scheduler = to_diffusers(denoiser.schedule, denoiser.prediction, denoiser.clip, denoiser.sampler)
    unconditional = DDPMPipeline if denoiser.sampler == "renoise" else DDIMPipeline
    pipeline = unconditional if network.config.num_class_embeds is None else ConsistencyModelPipeline
    pipeline(unet=to_stock(network), scheduler=scheduler).save_pretrained(folder, safe_serialization=True)
