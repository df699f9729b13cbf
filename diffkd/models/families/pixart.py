"""PixArt-alpha and PixArt-Sigma: text-to-image transformers on latents (Chen et al. 2024), in and out of
their stock pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from diffkd.core.conditioning import Cond
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import to_diffusers
from diffkd.errors import UserError
from diffkd.models import flow_pipelines, networks, schedulers
from diffkd.models.codecs import Autoencoder
from diffkd.models.masked_prompts import MASK, STATES, PixArtPrompts
from diffkd.models.pipeline_files import STEM
from diffkd.models.source import Source

ALPHA = "PixArtAlphaPipeline"
TOKENS = {"PixArtSigmaPipeline": 300, ALPHA: 120}
PIPELINES = tuple(TOKENS)
NETWORK = PixArtTransformer2DModel
# the pipeline guides by default, rewrites prompts where two more packages are there, and draws at the nearest
# size that it knows
CALL = {"guidance_scale": 1.0, "clean_caption": False, "use_resolution_binning": False}
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
COPIED = {"vae": STEM, "text_encoder": "model", "tokenizer": None}
TOLD_SIZES = 128  # the sample_size of the networks that the alpha pipeline tells the image's size
MOST_TOKENS = 1 << 16  # of an image; the published networks have 16,384 at most
COUNTS = (
    "num_attention_heads", "attention_head_dim", "in_channels", "sample_size", "patch_size", "num_layers",
    "caption_channels",
)  # fmt: skip


def load(source: Source) -> Denoiser:
    """A pipeline as a Denoiser in float32 (see `Family.load`). Its text encoder and autoencoder are checked,
    and read when they are first used."""
    config = flow_pipelines.config_of(source, NETWORK, COPIED)
    alpha = source.index["_class_name"] == ALPHA
    _check_config(config, source.name, alpha=alpha)
    side, patch = config["sample_size"], config["patch_size"]
    codec = Autoencoder(source, patch=patch, normalised=False)
    codec.check_channels(config["in_channels"])
    conditioner = PixArtPrompts(source, TOKENS[source.index["_class_name"]])
    flow_pipelines.check_width(source, conditioner, config["caption_channels"])
    network = networks.read(source, "transformer", NETWORK)
    network.register_to_config(out_channels=network.out_channels)  # which the stock pipeline divides by two
    sampling = schedulers.read(source)
    return Denoiser(
        network,
        sampling.schedule,
        sampling.prediction,
        shape=flow_pipelines.shape_of(source, codec, (side, side)),
        clip=sampling.clip,
        steps=source.card.get("steps"),
        sampler=sampling.sampler,
        call=partial(call, factor=codec.factor),
        example=conditioner.example,
        codec=codec,
        conditioner=conditioner,
    )


def call(network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond, *, factor: int) -> Tensor:
    """cond: encoder_hidden_states (B, L, D), encoder_attention_mask (B, L). factor: pixels a side of a
    latent, for a network that is told the image's size. A learned variance is left out."""
    told: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if getattr(network, "module", network).use_additional_conditions:
        height, width = x_t.shape[2] * factor, x_t.shape[3] * factor
        sides = [x_t.new_full((len(x_t), 1), side) for side in (height, width)]
        told["resolution"] = torch.cat(sides, 1)
        told["aspect_ratio"] = x_t.new_full((len(x_t), 1), height / width)
    output: Tensor = network(
        x_t, encoder_hidden_states=cond[STATES].to(x_t.dtype), encoder_attention_mask=cond[MASK],
        timestep=time, added_cond_kwargs=told, return_dict=False,
    )[0]  # fmt: skip
    return output[:, : x_t.shape[1]]


def default_size(denoiser: Denoiser) -> tuple[int, int]:
    """Height and width of the latents that the stock pipeline draws where none are named."""
    network: Any = denoiser.network
    return network.config.sample_size, network.config.sample_size


def _check_config(config: Mapping[str, Any], name: str, *, alpha: bool) -> None:
    """Raises UserError for a network that `call` does not describe, or of images beyond all use."""
    networks.check_counts(config, name, COUNTS)
    networks.check_variance(config, name)
    networks.check_tokens(config, name, MOST_TOKENS)
    given = config["use_additional_conditions"]
    takes = config["sample_size"] == TOLD_SIZES if given is None else given
    tells = alpha and config["sample_size"] == TOLD_SIZES
    if takes is not tells:
        raise UserError(
            f"{name} has a network that is {'' if takes else 'not '}told the image's size "
            f"(use_additional_conditions), and its pipeline {'tells' if tells else 'does not tell'} it; is "
            "model_index.json the one that it was saved with?"
        )


def save(denoiser: Denoiser, folder: Path) -> None:
    """The teacher's pipeline with another network and scheduler; all else is copied."""
    scheduler = to_diffusers(denoiser.schedule, denoiser.prediction, denoiser.clip, denoiser.sampler)
    flow_pipelines.save(denoiser, folder, NETWORK, COPIED, scheduler)
