"""Pixel-space UNets: UNet2DModel with or without classes, read from and written to stock pipelines."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ConsistencyModelPipeline, DDIMPipeline, DDPMPipeline, UNet2DModel
from pydantic import Field
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import PREDICTIONS, Schedule, from_diffusers, to_diffusers
from diffkd.errors import UserError
from diffkd.io.config import Positive, Strict
from diffkd.io.text import quoted, reason
from diffkd.models import validation

PIPELINES = ("DDPMPipeline", "DDIMPipeline", "ConsistencyModelPipeline")
NETWORK = UNet2DModel


class QuickUNet2DModel(UNet2DModel):
    """A UNet2DModel that knows its dtype. The stock one walks through all of its modules to find it, twice in
    every forward pass: a fifth of the digits network's time at batch 1 (docs/performance.md)."""

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.conv_in.weight.dtype
        return found


def quick(network: UNet2DModel) -> UNet2DModel:
    """The same network, in place."""
    network.__class__ = QuickUNet2DModel
    return network


def stock(network: UNet2DModel) -> UNet2DModel:
    """The same weights as the class that diffusers knows by name."""
    same: UNet2DModel = copy.copy(network)
    same.__class__ = UNet2DModel
    return same


def reinitialized_like(network: UNet2DModel, **changes: Any) -> UNet2DModel:
    """A freshly initialised network of the same config but for these; in its dtype, place and mode. torch's
    own generators are as they were."""
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    first = next(network.parameters())
    with torch.random.fork_rng():
        made = quick(UNet2DModel.from_config({**config, **changes}))
    torch.nn.Module.to(made, first.device, first.dtype)  # diffusers' own warns of what does not concern it
    return made.train(network.training)


class UNet2D(Strict):
    """A new UNet2DModel for a teacher to be trained."""

    channels: list[Positive] = Field(
        [32, 64], min_length=1, description="channels of each resolution, halved in between"
    )
    layers: int = Field(1, ge=1, description="residual blocks of each resolution")
    attention: list[bool] | None = Field(None, description="self-attention at each resolution; default none")
    mid_attention: bool = Field(True, description="self-attention in the innermost block")
    attention_head_dim: int = Field(8, ge=1, description="channels of an attention head")
    norm_groups: int = Field(
        8, ge=1, description="groups of group normalisation; divides every channel count"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="in the residual blocks, while training")

    def build(self, shape: tuple[int, int, int], num_classes: int | None) -> UNet2DModel:
        """A freshly initialised network for images of (C, H, W); num_classes counts the null label too."""
        channels, height, width = shape
        factor = 2 ** (len(self.channels) - 1)
        if height % factor or width % factor:
            raise UserError(
                f"images of {height}x{width} cannot be halved {len(self.channels) - 1} times; "
                f"use sizes that {factor} divides, or fewer model.channels"
            )
        for count in self.channels:
            if count % self.norm_groups:
                raise UserError(
                    f"model.norm_groups {self.norm_groups} does not divide {count} channels; "
                    "choose one that divides each of model.channels"
                )
        attention = self.attention or [False] * len(self.channels)
        if len(attention) != len(self.channels):
            raise UserError(
                f"model.attention has {len(attention)} entries for {len(self.channels)} resolutions; "
                "give one for each of model.channels"
            )
        attended = [count for count, has in zip(self.channels, attention, strict=True) if has]
        if self.mid_attention:
            attended.append(self.channels[-1])
        for count in attended:
            if count < self.attention_head_dim:
                raise UserError(
                    f"model.attention_head_dim {self.attention_head_dim} is more than the {count} channels "
                    "there are where attention is; use fewer, or no attention there"
                )
        return quick(
            UNet2DModel(
                sample_size=height if height == width else (height, width),
                in_channels=channels,
                out_channels=channels,
                block_out_channels=tuple(self.channels),
                layers_per_block=self.layers,
                down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
                up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
                add_attention=self.mid_attention,
                attention_head_dim=self.attention_head_dim,
                norm_num_groups=self.norm_groups,
                dropout=self.dropout,
                num_class_embeds=num_classes,
            )
        )


def load(folder: Path, index: dict[str, Any], name: str, card: dict[str, Any]) -> Denoiser:
    """The pipeline in `folder` as a Denoiser in float32. name: how the user called it."""
    entry = index.get("unet")
    if not isinstance(entry, list) or entry[-1:] != ["UNet2DModel"]:
        raise UserError(
            f"{name} has a network of type {quoted(entry)}, which is not supported; supported is UNet2DModel"
        )
    network = _network(folder, name)
    if network.config.time_embedding_type != "positional":
        raise UserError(
            f"{name} takes time as {network.config.time_embedding_type!r}, which is not supported; "
            "supported are networks with time_embedding_type positional"
        )
    if network.config.out_channels != network.config.in_channels:
        raise UserError(
            f"{name} has out_channels {network.config.out_channels}, {network.config.in_channels} in, "
            "a learned variance perhaps; supported are networks that predict the image alone"
        )
    size = network.config.sample_size
    sides = (size, size) if size is None or type(size) is int else size
    if not (
        isinstance(sides, tuple | list)
        and len(sides) == 2
        and (size is None or all(type(side) is int and side > 0 for side in sides))
    ):
        raise UserError(f"{name} has sample_size {quoted(size)}; it is one whole number, or height and width")
    config = _scheduler_config(folder, name)
    schedule = _schedule(config, name)
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise UserError(
            f"{name} has prediction_type {quoted(prediction)}; supported are {', '.join(PREDICTIONS[:3])}"
        )
    kind = config.get("_class_name")
    clips = config.get("clip_sample", kind != "LCMScheduler")
    clip = config.get("clip_sample_range", 1.0) if clips else None
    if clip is not None and not (type(clip) in (int, float) and 0 < clip < math.inf):
        raise UserError(f"{name} has clip_sample_range {quoted(clip)}; it is a number above 0")
    if clip is not None and kind not in ("DDPMScheduler", "DDIMScheduler", "LCMScheduler"):
        clip = None  # other schedulers have no such option
    num_classes = network.config.num_class_embeds
    null_label = card.get("null_label")
    return Denoiser(
        network,
        schedule,
        prediction,
        num_classes=card.get("num_classes", num_classes),
        null_label=null_label,
        clip=clip,
        steps=card.get("steps"),
        sampler=card.get("sampler", "ddim"),
    )


def _network(folder: Path, name: str) -> UNet2DModel:
    """The UNet of a pipeline: in its `unet` folder, or at the root as early repositories have it."""
    place = folder / "unet" if (folder / "unet").is_dir() else folder
    validation.check_weights(place, name)
    try:
        validation.check_network(UNet2DModel, place, name)
        network, loading = UNet2DModel.from_pretrained(
            place, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:  # diffusers raises what it likes for a config that makes no network
        why = " ".join(str(error).split())[:300].removesuffix("; is it complete?")
        raise UserError(f"{name}: the network in {place} cannot be read ({why}); is it complete?") from error
    if loading["missing_keys"]:
        raise UserError(
            f"{name}: the weights in {place} lack {loading['missing_keys'][0]}; are they complete?"
        )
    return quick(network)


def _scheduler_config(folder: Path, name: str) -> dict[str, Any]:
    for place in (folder / "scheduler", folder):
        if (place / "scheduler_config.json").is_file():
            config = validation.read_object(place / "scheduler_config.json")
            validation.check_scheduler(config, name)
            return config
    raise UserError(f"{name} has no scheduler_config.json; save the pipeline with save_pretrained")


def _schedule(config: dict[str, Any], name: str) -> Schedule:
    kind = str(config.get("_class_name", "DDPMScheduler"))
    scheduler_class = getattr(diffusers, kind, None) if kind.endswith("Scheduler") else None
    if scheduler_class is None:
        raise UserError(
            f"{name} has scheduler {kind!r}, unknown to diffusers; use DDPMScheduler or DDIMScheduler"
        )
    try:
        schedule = from_diffusers(scheduler_class.from_config(config))
    except UserError:
        raise
    except Exception as error:  # whatever diffusers makes of numbers that are none
        raise UserError(
            f"{name} has a scheduler that diffusers cannot make ({reason(error)}); repair its config"
        ) from error
    if not ((schedule.alphas_cumprod >= 0) & (schedule.alphas_cumprod <= 1)).all():
        raise UserError(f"{name} has a scheduler whose noise is out of range; repair its betas")
    return schedule


def save(denoiser: Denoiser, folder: Path) -> None:
    """A pipeline that draws with the denoiser's own sampler: a ConsistencyModelPipeline, whose call takes
    `class_labels`, for classes; else a DDIMPipeline, or a DDPMPipeline for renoise, as DDIMPipeline would
    replace its scheduler."""
    network: Any = denoiser.network
    if any(map(is_traceable_wrapper_subclass, network.parameters())):
        raise UserError(
            "8-bit weights are no weights of a stock pipeline; save the model loaded without quantize"
        )
    if next(network.parameters()).dtype not in (torch.float32, torch.float16):
        raise UserError("stock pixel pipelines cannot make pictures in bfloat16; save in float32 or float16")
    network.to(memory_format=torch.contiguous_format)  # as it may not be on a GPU, and safetensors wants it
    scheduler = to_diffusers(denoiser.schedule, denoiser.prediction, denoiser.clip, denoiser.sampler)
    unconditional = DDPMPipeline if denoiser.sampler == "renoise" else DDIMPipeline
    pipeline = unconditional if network.config.num_class_embeds is None else ConsistencyModelPipeline
    pipeline(unet=stock(network), scheduler=scheduler).save_pretrained(folder, safe_serialization=True)
