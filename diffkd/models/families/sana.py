"""SANA: text-to-image transformers of linear attention on deeply compressed latents of flows (Xie et al.
2025), in and out of SanaPipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

from diffkd.core.conditioning import Cond
from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.models import flow_pipelines, flow_schedulers, networks
from diffkd.models.codecs import Autoencoder
from diffkd.models.lora_files import Keys
from diffkd.models.masked_prompts import MASK, STATES, SanaPrompts
from diffkd.models.pipeline_files import STEM
from diffkd.models.source import Source

PIPELINES = ("SanaPipeline",)
NETWORK = SanaTransformer2DModel
# the pipeline guides by default, and draws at the nearest size that it knows
CALL = {"guidance_scale": 1.0, "use_resolution_binning": False}
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
LORA = Keys("transformer")
scheduler_of = flow_pipelines.scheduler_of
COPIED = {"vae": STEM, "text_encoder": "model", "tokenizer": None}
PIXELS = 1024  # a side of the images that the stock pipeline draws where no size is named
MOST_TOKENS = 1 << 16  # of an image; the published networks have 16,384 at most
COUNTS = (
    "num_attention_heads", "attention_head_dim", "in_channels", "sample_size", "patch_size", "num_layers",
    "caption_channels",
)  # fmt: skip


def load(source: Source) -> Denoiser:
    """A pipeline as a Denoiser in float32 (see `Family.load`). Its text encoder and autoencoder are checked,
    and read when they are first used."""
    config = flow_pipelines.config_of(source, NETWORK, COPIED)
    _check_config(config, source.name)
    side, patch = config["sample_size"], config["patch_size"]
    codec = Autoencoder(source, patch=patch, kinds=("AutoencoderDC",))
    codec.check_channels(config["in_channels"])
    conditioner = SanaPrompts(source)
    flow_pipelines.check_width(source, conditioner, config["caption_channels"])
    shape = flow_pipelines.shape_of(source, codec, (side, side))
    sampling = flow_schedulers.read(source, shape, handed=False, patch=patch)
    network = networks.read(source, "transformer", NETWORK)
    network.register_to_config(out_channels=config["out_channels"] or config["in_channels"])
    return flow_pipelines.denoiser_of(source, network, sampling, shape, codec, conditioner, call=call)


def call(network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """cond: encoder_hidden_states (B, 300, D), encoder_attention_mask (B, 300). A learned variance is left
    out."""
    config = cast(Any, getattr(network, "module", network)).config  # which DDP does not pass on
    output: Tensor = network(
        x_t, encoder_hidden_states=cond[STATES].to(x_t.dtype), encoder_attention_mask=cond[MASK],
        timestep=time * config.timestep_scale, return_dict=False,
    )[0]  # fmt: skip
    return output[:, : x_t.shape[1]]


def default_size(denoiser: Denoiser) -> tuple[int, int]:
    """Height and width of the latents that the stock pipeline draws where none are named."""
    assert denoiser.codec is not None
    return PIXELS // denoiser.codec.factor, PIXELS // denoiser.codec.factor


def _check_config(config: Mapping[str, Any], name: str) -> None:
    """Raises UserError for a network that `call` does not describe, or of images beyond all use."""
    networks.check_counts(config, name, COUNTS)
    networks.check_variance(config, name)
    networks.check_tokens(config, name, MOST_TOKENS)
    if config["guidance_embeds"]:
        raise UserError(
            f"{name} has guidance_embeds {config['guidance_embeds']}: it is a SANA-Sprint, already distilled "
            "to a few steps; give the SANA that it was made of"
        )
    scale = config["timestep_scale"]
    if type(scale) not in (int, float) or not scale > 0:
        raise UserError(f"{name} has timestep_scale {scale!r}; supported is a number above 0")


def save(denoiser: Denoiser, folder: Path) -> None:
    """The teacher's pipeline with another network and scheduler; all else is copied."""
    flow_pipelines.save(denoiser, folder, NETWORK, COPIED)
