"""Qwen-Image: text-to-image transformers of two streams on latents of flows (Wu et al. 2025), in and out of
QwenImagePipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn

from diffkd.core.conditioning import Cond
from diffkd.core.denoiser import Denoiser
from diffkd.core.guidance import token_norms
from diffkd.errors import UserError
from diffkd.models import flow_pipelines, flow_schedulers, networks, packing
from diffkd.models.codecs import OF_FRAMES, Autoencoder
from diffkd.models.lora_files import Keys
from diffkd.models.masked_prompts import MASK, STATES, QwenImagePrompts
from diffkd.models.packing import PATCH
from diffkd.models.pipeline_files import STEM
from diffkd.models.source import Source

PIPELINES = ("QwenImagePipeline",)
NETWORK = QwenImageTransformer2DModel
CALL: dict[str, Any] = {}  # the pipeline guides only where a negative prompt is named
LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip
LORA = Keys("transformer")
scheduler_of = flow_pipelines.scheduler_of
GLOBAL_NOISE = True
COPIED = {"vae": STEM, "text_encoder": "model", "tokenizer": None}
SIDE = 128  # of the latents that the stock pipeline draws where no size is named
MOST_PLACES = 4096  # tokens a side that its position embedding has room for, beside those of a prompt
COUNTS = (
    "in_channels", "patch_size", "num_layers", "attention_head_dim", "num_attention_heads",
    "joint_attention_dim",
)  # fmt: skip


def load(source: Source) -> Denoiser:
    """A pipeline as a Denoiser in float32 (see `Family.load`). Its text encoder and autoencoder are checked,
    and read when they are first used."""
    config = flow_pipelines.config_of(source, NETWORK, COPIED)
    _check_config(config, source.name)
    codec = Autoencoder(source, patch=PATCH, largest=PATCH * MOST_PLACES, kinds=(OF_FRAMES,))
    codec.check_channels(config["in_channels"] // PATCH**2)
    conditioner = QwenImagePrompts(source)
    flow_pipelines.check_width(source, conditioner, config["joint_attention_dim"])
    shape = flow_pipelines.shape_of(source, codec, (SIDE, SIDE))
    sampling = flow_schedulers.read(source, shape, handed=True, patch=PATCH)
    flow_pipelines.check_thousand(source, sampling.schedule)
    network = networks.read(source, "transformer", NETWORK)
    return flow_pipelines.denoiser_of(
        source, network, sampling, shape, codec, conditioner, call=call, guide=token_norms
    )


def call(network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond, *, listed: int | None = None) -> Tensor:
    """cond: encoder_hidden_states (B, 512, D), encoder_attention_mask (B, 512). The network takes packed
    latents and the size of their one frame, and sigma as time. listed: how often that size is named, of which
    the network reads the first; default once for each image, as stock does."""
    height, width = x_t.shape[2:]
    output: Tensor = network(
        hidden_states=packing.pack(x_t),
        timestep=time / flow_pipelines.THOUSAND,
        encoder_hidden_states=cond[STATES].to(x_t.dtype),
        encoder_hidden_states_mask=cond[MASK].bool(),
        img_shapes=[[(1, height // PATCH, width // PATCH)]] * (listed or len(x_t)),
        return_dict=False,
    )[0]
    return packing.unpack(output, height, width)


def default_size(denoiser: Denoiser) -> tuple[int, int]:
    """Height and width of the latents that the stock pipeline draws where none are named."""
    return SIDE, SIDE


def _check_config(config: Mapping[str, Any], name: str) -> None:
    """Raises UserError for a network that `call` does not describe."""
    networks.check_counts(config, name, COUNTS)
    networks.check_supported(
        config, name,
        {
            "patch_size": (PATCH,), "guidance_embeds": (False, None), "zero_cond_t": (False, None),
            "use_additional_t_cond": (False, None), "use_layer3d_rope": (False, None),
        },
    )  # fmt: skip
    given, made = config["in_channels"], config["out_channels"] or config["in_channels"]
    if given != made * PATCH**2:
        raise UserError(
            f"{name} has in_channels {given} and out_channels {made}; supported are networks that take "
            f"noised latents alone, of {PATCH}x{PATCH} to a token"
        )


def save(denoiser: Denoiser, folder: Path) -> None:
    """The teacher's pipeline with another network and scheduler; all else is copied."""
    flow_pipelines.save(denoiser, folder, NETWORK, COPIED)
