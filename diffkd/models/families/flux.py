"""Flux.1: transformers on packed latents of flows, in and out of FluxPipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from diffkd.core.conditioning import Cond
from diffkd.core.denoiser import GUIDANCE, Denoiser
from diffkd.errors import UserError
from diffkd.io.text import quoted
from diffkd.models import flow_pipelines, flow_schedulers, networks, packing
from diffkd.models.codecs import Autoencoder
from diffkd.models.conditioners import FluxPrompts
from diffkd.models.lora_files import Keys
from diffkd.models.pipeline_files import STEM
from diffkd.models.source import Source

PIPELINES = ("FluxPipeline",)
NETWORK = FluxTransformer2DModel
CALL: dict[str, Any] = {}  # without a negative prompt the pipeline guides by no second pass
LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip
LORA = Keys("transformer", kohya="lora_transformer", comfy_alone=True)
scheduler_of = flow_pipelines.scheduler_of
GLOBAL_NOISE = True
COPIED = {
    "vae": STEM, "text_encoder": "model", "text_encoder_2": "model", "tokenizer": None, "tokenizer_2": None,
    "image_encoder": "model", "feature_extractor": None,
}  # fmt: skip
COUNTS = (
    "in_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads",
    "joint_attention_dim", "pooled_projection_dim",
)  # fmt: skip
SIDE = 128  # of the latents of the pipeline's own images, whatever its network
UNKNOWN_RANGE = (1.0, 5.0)  # of the weights that a network was trained for, where no card says it
USUAL_GUIDANCE = 3.5  # of the pipeline


def load(source: Source) -> Denoiser:
    """A pipeline as a Denoiser in float32 (see `Family.load`). Its text encoders and autoencoder are checked,
    and read when they are first used."""
    config = flow_pipelines.config_of(source, NETWORK, COPIED)
    _check_config(config, source.name)
    codec = Autoencoder(source, patch=packing.PATCH, shifted=True)
    if (taken := config["in_channels"]) != packing.PATCH**2 * codec.channels:
        raise UserError(
            f"{source.name} has in_channels {taken}, and patches of its autoencoder's latents have "
            f"{packing.PATCH**2 * codec.channels}; supported are networks that take noised latents alone"
        )
    conditioner = FluxPrompts(source)
    _check_widths(config, conditioner)
    shape = flow_pipelines.shape_of(source, codec, (SIDE, SIDE))
    sampling = flow_schedulers.read(source, shape, handed=True, patch=packing.PATCH)
    network = networks.read(source, "transformer", NETWORK)
    weights = source.card.get("guidance_range", UNKNOWN_RANGE) if config["guidance_embeds"] else None
    return flow_pipelines.denoiser_of(
        source, network, sampling, shape, codec, conditioner, call=call, guidance_range=weights,
        guidance_by_default=USUAL_GUIDANCE,
    )  # fmt: skip


def call(network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """cond: encoder_hidden_states (B, 512, D), pooled_projections (B, P); for a network that takes it
    guidance_scale (B,). The network is given sigma as time."""
    height, width = x_t.shape[-2:]
    states, pooled = (cond[key].to(x_t.dtype) for key in ("encoder_hidden_states", "pooled_projections"))
    places = packing.places(height, width, x_t)
    output: Tensor = network(
        packing.pack(x_t), encoder_hidden_states=states, pooled_projections=pooled, timestep=time / 1000,
        guidance=cond[GUIDANCE].float() if GUIDANCE in cond else None, img_ids=places,
        txt_ids=places.new_zeros(states.shape[1], 3), return_dict=False,
    )[0]  # fmt: skip
    return packing.unpack(output, height, width)


def default_size(denoiser: Denoiser) -> tuple[int, int]:
    """Height and width of the latents that the stock pipeline draws where none are named."""
    return SIDE, SIDE


def _check_config(config: Mapping[str, Any], name: str) -> None:
    """Raises UserError for a network that `call` does not describe."""
    for key in COUNTS:
        if not (type(config[key]) is int and config[key] > 0):
            raise UserError(f"{name} has {key} {quoted(config[key])}; supported is a positive integer")
    networks.check_supported(config, name, {"patch_size": (1,), "guidance_embeds": (True, False)})
    if config["out_channels"] not in (None, config["in_channels"]):
        raise UserError(
            f"{name} has in_channels {config['in_channels']} and out_channels "
            f"{quoted(config['out_channels'])}, the network of an editing or a control pipeline; supported "
            "are networks that take noised latents alone"
        )


def _check_widths(config: Mapping[str, Any], conditioner: FluxPrompts) -> None:
    """Raises UserError where encoders and network do not fit each other."""
    taken = config["joint_attention_dim"], config["pooled_projection_dim"]
    given = tuple(value.shape[-1] for value in conditioner.example.values())
    if given != taken:
        raise UserError(
            f"{conditioner.name} has text encoders of widths {given[0]} and {given[1]}, and its network "
            f"takes {taken[0]} and {taken[1]}; are they of one model?"
        )


def save(denoiser: Denoiser, folder: Path) -> None:
    """The teacher's pipeline with another network and scheduler; all else is copied."""
    flow_pipelines.save(denoiser, folder, NETWORK, COPIED)
