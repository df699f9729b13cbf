"""What the first programs call the weights of Stable Diffusion and SDXL: those of diffusers under the names
of CompVis' latent-diffusion and of OpenCLIP, which ComfyUI, A1111 and from_single_file read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
XL_CLIP, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
Weights = Mapping[str, Tensor]

OUTER = {  # of a UNet, around its blocks
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
RESIDUAL = {  # of a UNet's residual block
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}  # of a VAE
OPEN_CLIP_PARTS = {  # of a text encoder, in this order
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding": "token_embedding", "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn": "attn",
}  # fmt: skip
BLOCK = re.compile(
    r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)


def unet(weights: Weights, layers: int) -> dict[str, Tensor]:
    """Of a UNet2DConditionModel whose blocks have so many residual blocks each (layers_per_block), those on
    the way up one more. Raises ValueError for a name that there is no place for."""
    attended = {
        found[2]
        for found in map(BLOCK.match, weights)
        if found and found[1] == "up" and found[3] == "attentions"
    }
    return {UNET + _of_unet(name, layers, attended): value for name, value in weights.items()}


def _of_unet(name: str, layers: int, attended: Iterable[str | None]) -> str:
    layer, _, last = name.rpartition(".")
    if layer in OUTER:
        return f"{OUTER[layer]}.{last}"
    found = BLOCK.fullmatch(name)
    if found is None:
        raise ValueError(f"{name} has no place in it")
    way, block, part, number, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if part == "resnets":
        inner, _, last = rest.rpartition(".")
        rest = f"{RESIDUAL[inner]}.{last}"
    if way == "mid":
        return f"middle_block.{2 * number + (part == 'attentions')}.{rest}"
    place, column = block * (layers + 1) + number, 0 if part == "resnets" else 1
    if way == "down":
        if part == "downsamplers":  # a place of its own, behind the layers
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.{rest.replace('conv.', 'op.', 1)}"
        return f"input_blocks.{place + 1}.{column}.{rest}"
    if part == "upsamplers":  # at the last layer's place, behind its attention where there is one
        column, place = 1 + (found[2] in attended), block * (layers + 1) + layers
    return f"output_blocks.{place}.{column}.{rest}"


def vae(weights: Weights) -> dict[str, Tensor]:
    """Of an AutoencoderKL. Its attention's projections are convolutions of 1x1 there."""
    blocks = 1 + max(
        int(found[2]) for found in map(_AUTOENCODER.match, weights) if found and found[1] == "decoder.up"
    )
    made: dict[str, Tensor] = {}
    for name, value in weights.items():
        inner = _of_vae(name, blocks)
        projection = ".attn_1." in inner and inner.endswith(".weight") and value.ndim == 2
        made[VAE + inner] = value[:, :, None, None] if projection else value
    return made


_AUTOENCODER = re.compile(r"(encoder\.down|decoder\.up)_blocks\.(\d+)\.(resnets\.(\d+)|\w+samplers\.0)\.(.+)")


def _of_vae(name: str, blocks: int) -> str:
    name = name.replace(".conv_norm_out.", ".norm_out.")
    if found := _AUTOENCODER.fullmatch(name):
        side, number, rest = found[1], int(found[2]), found[5].replace("conv_shortcut", "nin_shortcut")
        level = number if side == "encoder.down" else blocks - 1 - number
        part = f"block.{found[4]}" if found[4] else "downsample" if side == "encoder.down" else "upsample"
        return f"{side}.{level}.{part}.{rest}"
    if found := re.fullmatch(r"(.*)mid_block\.resnets\.(\d)\.(.+)", name):
        return f"{found[1]}mid.block_{int(found[2]) + 1}.{found[3].replace('conv_shortcut', 'nin_shortcut')}"
    if found := re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.+)\.(\w+)", name):
        return f"{found[1]}mid.attn_1.{ATTENTION[found[2]]}.{found[3]}"
    return name


def clip(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """Of a CLIPTextModel, whose own names the first Stable Diffusion has, under this prefix."""
    return {prefix + name: value for name, value in _plain(weights).items()}


def open_clip(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """Of a CLIPTextModel or one with a projection, as OpenCLIP has it, under this prefix: query, key and
    value are one matrix, and the projection is the other way round."""
    weights, made = _plain(weights), dict[str, Tensor]()
    for name, value in weights.items():
        if name == "text_projection.weight":
            made[f"{prefix}text_projection"] = value.T.contiguous()
        elif ".q_proj." in name:
            three = [weights[name.replace(".q_proj.", f".{one}_proj.")] for one in "qkv"]
            made[prefix + _of_open_clip(name.replace("q_proj.", "in_proj_"))] = torch.cat(three)
        elif ".k_proj." not in name and ".v_proj." not in name:
            made[prefix + _of_open_clip(name)] = value
    return made


def _of_open_clip(name: str) -> str:
    for here, there in OPEN_CLIP_PARTS.items():
        name = name.replace(here, there)
    return name


def _plain(weights: Weights) -> dict[str, Tensor]:
    """By the names that all versions of transformers have written: below text_model, but for the
    projection."""
    whole = ("text_model.", "text_projection.")
    return {
        name if name.startswith(whole) else f"text_model.{name}": value for name, value in weights.items()
    }
