"""Stable Diffusion 3 and 3.5: transformers on latents of flows (Esser et al. 2024), in and out of
StableDiffusion3Pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from diffkd.core.conditioning import Cond
from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.io.text import quoted
from diffkd.models import flow_pipelines, flow_schedulers, networks
from diffkd.models.codecs import Autoencoder
from diffkd.models.conditioners import SD3_TOKENS, SD3Prompts
from diffkd.models.joint_attention import repeat_last
from diffkd.models.lora_files import Keys
from diffkd.models.pipeline_files import STEM
from diffkd.models.source import Source

PIPELINES = ("StableDiffusion3Pipeline",)
NETWORK = SD3Transformer2DModel
CALL = {"guidance_scale": 1.0}  # the pipeline guides by default
LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip
LORA = Keys("transformer", kohya="lora_transformer", comfy_alone=True)
scheduler_of = flow_pipelines.scheduler_of
GLOBAL_NOISE = True
COPIED = {
    "vae": STEM, "text_encoder": "model", "text_encoder_2": "model", "text_encoder_3": "model",
    "tokenizer": None, "tokenizer_2": None, "tokenizer_3": None, "image_encoder": "model",
    "feature_extractor": None,
}  # fmt: skip
COUNTS = (
    "sample_size", "patch_size", "in_channels", "num_layers", "attention_head_dim", "num_attention_heads",
    "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim", "pos_embed_max_size",
)  # fmt: skip
MOST_PLACES = 1 << 10  # a side that a network has positions for; the published ones have 384 at most


def load(source: Source) -> Denoiser:
    """A pipeline as a Denoiser in float32 (see `Family.load`). Its text encoders and autoencoder are checked,
    and read when they are first used."""
    config = flow_pipelines.config_of(source, NETWORK, COPIED)
    _check_config(config, source.name)
    patch, side = config["patch_size"], config["sample_size"]
    codec = Autoencoder(source, patch=patch, largest=patch * config["pos_embed_max_size"], shifted=True)
    codec.check_channels(config["in_channels"])
    conditioner = SD3Prompts(source, config["joint_attention_dim"])
    if (pooled := conditioner.example["pooled_projections"].shape[1]) != config["pooled_projection_dim"]:
        raise UserError(
            f"{source.name} has text encoders whose pooled embeddings are {pooled} wide, and its network "
            f"takes {config['pooled_projection_dim']}; are they of one model?"
        )
    shape = flow_pipelines.shape_of(source, codec, (side, side))
    sampling = flow_schedulers.read(source, shape, handed=False, patch=patch)
    network = networks.read(source, "transformer", NETWORK)
    if not conditioner.with_t5:
        repeat_last(network, SD3_TOKENS)
    return flow_pipelines.denoiser_of(source, network, sampling, shape, codec, conditioner, call=call)


def call(network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """cond: encoder_hidden_states (B, 77 + 256, D), without T5 (B, 77 + 1, D), pooled_projections (B, P)."""
    states, pooled = (cond[key].to(x_t.dtype) for key in ("encoder_hidden_states", "pooled_projections"))
    output: Tensor = network(
        x_t, encoder_hidden_states=states, pooled_projections=pooled, timestep=time, return_dict=False
    )[0]
    return output


def default_size(denoiser: Denoiser) -> tuple[int, int]:
    """Height and width of the latents that the stock pipeline draws where none are named."""
    network: Any = denoiser.network
    return network.config.sample_size, network.config.sample_size


def _check_config(config: Mapping[str, Any], name: str) -> None:
    """Raises UserError for a network that `call` does not describe, or of images beyond all use."""
    for key in COUNTS:
        if not (type(config[key]) is int and config[key] > 0):
            raise UserError(f"{name} has {key} {quoted(config[key])}; supported is a positive integer")
    networks.check_supported(config, name, {"qk_norm": (None, "rms_norm")})
    if config["out_channels"] not in (None, config["in_channels"]):
        raise UserError(
            f"{name} has in_channels {config['in_channels']} and out_channels "
            f"{quoted(config['out_channels'])}; supported are networks that take noised latents alone"
        )
    if not config["sample_size"] <= config["patch_size"] * config["pos_embed_max_size"]:
        raise UserError(
            f"{name} has sample_size {config['sample_size']} and pos_embed_max_size "
            f"{config['pos_embed_max_size']}, which are too few places for it; repair one of them"
        )
    if config["pos_embed_max_size"] > MOST_PLACES:
        raise UserError(
            f"{name} has pos_embed_max_size {config['pos_embed_max_size']}; supported are up to {MOST_PLACES}"
        )


def save(denoiser: Denoiser, folder: Path) -> None:
    """The teacher's pipeline with another network and scheduler; all else is copied."""
    flow_pipelines.save(denoiser, folder, NETWORK, COPIED)
