"""The guidance weight as an input of a network (Meng et al. 2023), where diffusers has a place for it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.io.text import a_or_an

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

EMBEDDING = "time_embedding.cond_proj"  # where a UNet has it
WIDTH = 256  # of the embedding that a student gets, as the published LCM students have it


def check(network: nn.Module) -> None:
    """Raises UserError where a network has no place for it."""
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel  # measuring folders does not need it

    if isinstance(network, FluxTransformer2DModel) and network.config.guidance_embeds:
        raise UserError(
            f"{a_or_an(type(network).__name__)} with guidance embeddings takes its weight as an input "
            "already, and its students do; leave this method, or its range, out"
        )
    if not isinstance(network, UNet2DConditionModel):
        raise UserError(
            f"{a_or_an(type(network).__name__)} has no place for a guidance weight as an input; bake one in "
            "(method.guidance)"
        )


def attach(network: nn.Module, width: int = WIDTH) -> None:
    """Gives the network an embedding of the weight, in place, which is 0 until it is trained: it takes
    `timestep_cond`. Raises UserError as `check` does."""
    check(network)
    unet = cast("UNet2DConditionModel", network)
    like = unet.time_embedding.linear_1.weight  # (width of the time's embedding, channels)
    embedding = nn.Linear(width, like.shape[1], bias=False, device=like.device, dtype=like.dtype)
    nn.init.zeros_(embedding.weight)
    unet.time_embedding.cond_proj = embedding
    unet.register_to_config(time_cond_proj_dim=width)


def detach(network: UNet2DConditionModel) -> None:
    """Takes it away again."""
    network.time_embedding.cond_proj = None
    network.register_to_config(time_cond_proj_dim=None)


def is_unused(network: UNet2DConditionModel) -> bool:
    """Whether the network has one of zeros, whatever the weight is."""
    embedding = network.time_embedding.cond_proj
    return embedding is not None and not bool(embedding.weight.any())


@torch.no_grad()
def fold(denoiser: Denoiser, weight: float) -> None:
    """Makes a denoiser that takes its guidance as an input one that has this weight baked in, in place: its
    embedding is added to a bias, and its network takes no other. Raises UserError for another denoiser."""
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel

    network = denoiser.network
    if denoiser.guidance_range is None or not isinstance(
        network, UNet2DConditionModel | FluxTransformer2DModel
    ):
        raise UserError(
            f"{denoiser.name} does not take its guidance as an input, so none can be baked in beforehand: "
            "leave out teacher.guidance, and name it for the method (method.guidance)"
        )
    if isinstance(network, UNet2DConditionModel):
        time: Any = network.time_embedding
        given = embedded(torch.tensor([weight]), network.config.time_cond_proj_dim).to(time.linear_1.weight)
        time.linear_1.bias += time.linear_1(time.cond_proj(given))[0] - time.linear_1.bias
        detach(network)
    else:
        from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings

        known: Any = network.time_text_embed
        bias = known.timestep_embedder.linear_2.bias
        waves = known.time_proj(torch.tensor([1000 * weight], device=bias.device)).to(bias)
        bias += known.guidance_embedder(waves)[0]
        config = network.config
        width = config.num_attention_heads * config.attention_head_dim
        with torch.device("meta"):
            made = CombinedTimestepTextProjEmbeddings(width, config.pooled_projection_dim)
        for name, module in known.named_children():
            if name != "guidance_embedder":
                setattr(made, name, module)
        network.time_text_embed = made.train(known.training)
        network.register_to_config(guidance_embeds=False)
    denoiser.guidance_range, denoiser.guidance_baked_in, denoiser.folded = None, weight, weight


def embedded(weight: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of w - 1 as stock pipelines embed it: (B,) -> (B, width) float32."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=weight.device) * -(math.log(10_000) / (half - 1)))
    angles = 1000 * (weight.float() - 1)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    return nn.functional.pad(waves, (0, width - 2 * half))
