"""Lumina 2: text-to-image transformers on latents of flows (Qin et al. 2025), in and out of
Lumina2Pipeline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import Lumina2Transformer2DModel
from torch import Tensor, nn

from diffkd.core.conditioning import Cond
from diffkd.core.denoiser import Denoiser
from diffkd.core.flow_schedule import mu_of
from diffkd.core.guidance import row_norms
from diffkd.errors import UserError
from diffkd.models import flow_pipelines, flow_schedulers, networks
from diffkd.models.codecs import Autoencoder
from diffkd.models.lora_files import Keys
from diffkd.models.masked_prompts import LUMINA2_TOKENS, MASK, STATES, Lumina2Prompts
from diffkd.models.pipeline_files import STEM
from diffkd.models.source import Source

PIPELINES = ("Lumina2Pipeline",)
NETWORK = Lumina2Transformer2DModel
CALL = {"guidance_scale": 1.0}  # the pipeline guides by default
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
LORA = Keys("transformer")
scheduler_of = flow_pipelines.scheduler_of
GLOBAL_NOISE = True
COPIED = {"vae": STEM, "text_encoder": "model", "tokenizer": None}
FACTOR = 8  # pixels a side of a latent, which the stock pipeline takes for granted
COUNTS = (
    "sample_size", "patch_size", "in_channels", "hidden_size", "num_layers", "num_refiner_layers",
    "num_attention_heads", "num_kv_heads", "cap_feat_dim",
)  # fmt: skip


def load(source: Source) -> Denoiser:
    """A pipeline as a Denoiser in float32 (see `Family.load`). Its text encoder and autoencoder are checked,
    and read when they are first used."""
    config = flow_pipelines.config_of(source, NETWORK, COPIED)
    _check_config(config, source.name)
    side, patch = config["sample_size"], config["patch_size"]
    codec = Autoencoder(source, patch=patch, largest=patch * min(config["axes_lens"][1:]), shifted=True)
    codec.check_channels(config["in_channels"])
    flow_pipelines.check_factor(codec, FACTOR)
    conditioner = Lumina2Prompts(source)
    flow_pipelines.check_width(source, conditioner, config["cap_feat_dim"])
    _check_shift(source, codec.channels)
    shape = flow_pipelines.shape_of(source, codec, (side, side))
    sampling = flow_schedulers.read(source, shape, handed=True, patch=patch)
    flow_pipelines.check_thousand(source, sampling.schedule)
    network = networks.read(source, "transformer", NETWORK)
    return flow_pipelines.denoiser_of(
        source, network, sampling, shape, codec, conditioner, call=call, guide=row_norms
    )


def call(network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """cond: encoder_hidden_states (B, 256, D), encoder_attention_mask (B, 256). The network's time runs from
    noise to data, and so does its output."""
    output: Tensor = network(
        x_t, timestep=1 - time / flow_pipelines.THOUSAND, encoder_hidden_states=cond[STATES].to(x_t.dtype),
        encoder_attention_mask=cond[MASK].bool(), return_dict=False,
    )[0]  # fmt: skip
    return -output


def default_size(denoiser: Denoiser) -> tuple[int, int]:
    """Height and width of the latents that the stock pipeline draws where none are named."""
    network: Any = denoiser.network
    return network.config.sample_size, network.config.sample_size


def _check_config(config: Mapping[str, Any], name: str) -> None:
    """Raises UserError for a network that `call` does not describe."""
    networks.check_counts(config, name, COUNTS)
    networks.check_positions(config, name, "axes_lens", LUMINA2_TOKENS)
    if config["out_channels"] not in (None, config["in_channels"]):
        raise UserError(
            f"{name} has in_channels {config['in_channels']} and out_channels {config['out_channels']!r}; "
            "supported are networks that take noised latents alone"
        )


def _check_shift(source: Source, channels: int) -> None:
    """Raises UserError for a dynamic shift: the stock pipeline makes it of the channels of its latents, which
    it takes for the number of its tokens."""
    _, config = source.scheduler()
    if config.get("use_dynamic_shifting"):
        mu = mu_of(channels, *(config.get(key, default) for key, default in flow_schedulers.OF_MU.items()))
        raise UserError(
            f"{source.name} has a scheduler with use_dynamic_shifting, of which its pipeline makes one shift "
            f"for all sizes; set it to false, and shift to that one, {math.exp(mu):.6g}"
        )


def save(denoiser: Denoiser, folder: Path) -> None:
    """The teacher's pipeline with another network and scheduler; all else is copied."""
    flow_pipelines.save(denoiser, folder, NETWORK, COPIED)
