"""Z-Image: text-to-image transformers of one stream on latents of flows (Z-Image team 2025), in and out of
ZImagePipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn

from diffkd.core.conditioning import Cond
from diffkd.core.denoiser import Denoiser
from diffkd.core.guidance import from_given
from diffkd.errors import UserError
from diffkd.io.text import quoted
from diffkd.models import flow_pipelines, flow_schedulers, networks
from diffkd.models.codecs import Autoencoder
from diffkd.models.lora_files import Keys
from diffkd.models.masked_prompts import MASK, STATES, Z_IMAGE_TOKENS, ZImagePrompts
from diffkd.models.pipeline_files import STEM
from diffkd.models.source import Source

PIPELINES = ("ZImagePipeline",)
NETWORK = ZImageTransformer2DModel
CALL = {"guidance_scale": 0.0}  # the pipeline guides by default, and its weight is one less than diffkd's
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
LORA = Keys("transformer")
scheduler_of = flow_pipelines.scheduler_of
GLOBAL_NOISE = True
COPIED = {"vae": STEM, "text_encoder": "model", "tokenizer": None}
PIXELS = 1024  # a side of the images that the stock pipeline draws where no size is named
PATCH = 2  # latents a side of a token, of which the pipeline's call makes use
COUNTS = ("in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads", "cap_feat_dim")


def load(source: Source) -> Denoiser:
    """A pipeline as a Denoiser in float32 (see `Family.load`). Its text encoder and autoencoder are checked,
    and read when they are first used."""
    config = flow_pipelines.config_of(source, NETWORK, COPIED)
    _check_config(config, source.name)
    codec = Autoencoder(source, patch=PATCH, largest=PATCH * min(config["axes_lens"][1:]), shifted=True)
    codec.check_channels(config["in_channels"])
    conditioner = ZImagePrompts(source)
    flow_pipelines.check_width(source, conditioner, config["cap_feat_dim"])
    side = PIXELS // codec.factor
    shape = flow_pipelines.shape_of(source, codec, (side, side))
    sampling = flow_schedulers.read(source, shape, handed=True, patch=PATCH)
    flow_pipelines.check_thousand(source, sampling.schedule)
    network = networks.read(source, "transformer", NETWORK)
    return flow_pipelines.denoiser_of(
        source, network, sampling, shape, codec, conditioner, call=call, guide=from_given
    )


def call(network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """cond: encoder_hidden_states (B, 512, D), encoder_attention_mask (B, 512): the network takes a list of
    the tokens of each prompt, and of images of one frame. Its time runs from noise to data, and so does its
    output."""
    states, mask = cond[STATES].to(x_t.dtype), cond[MASK].bool()
    prompts = [one[kept] for one, kept in zip(states, mask, strict=True)]
    thousand = flow_pipelines.THOUSAND
    output: list[Tensor] = network(
        [*x_t[:, :, None].unbind()], (thousand - time) / thousand, prompts, return_dict=False
    )[0]
    return -torch.stack(output)[:, :, 0]


def default_size(denoiser: Denoiser) -> tuple[int, int]:
    """Height and width of the latents that the stock pipeline draws where none are named."""
    assert denoiser.codec is not None
    return PIXELS // denoiser.codec.factor, PIXELS // denoiser.codec.factor


def _check_config(config: Mapping[str, Any], name: str) -> None:
    """Raises UserError for a network that `call` does not describe."""
    networks.check_counts(config, name, COUNTS)
    networks.check_positions(config, name, "axes_lens", Z_IMAGE_TOKENS + 1)  # and the image's own
    for key, needed in (("all_patch_size", PATCH), ("all_f_patch_size", 1)):
        if not isinstance(config[key], list | tuple) or needed not in config[key]:
            raise UserError(
                f"{name} has {key} {quoted(config[key])}, without the {needed} that its pipeline takes; is "
                "it complete?"
            )
    if config["siglip_feat_dim"] is not None:
        raise UserError(
            f"{name} has siglip_feat_dim {quoted(config['siglip_feat_dim'])}: its network takes images "
            "beside prompts; supported are those that take prompts alone"
        )


def save(denoiser: Denoiser, folder: Path) -> None:
    """The teacher's pipeline with another network and scheduler; all else is copied."""
    flow_pipelines.save(denoiser, folder, NETWORK, COPIED)
