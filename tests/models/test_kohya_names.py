"""Keys of adapters for other programs, of networks at full size without weights: beside literal ones, as
published files have them (SDXL's and Stable Diffusion's of LCM-LoRA, Hyper-SD and sd-scripts, those of
transformers of OneTrainer) and as ComfyUI's and A1111's maps of keys read them, and beside diffusers' own
writer and readers."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders import lora_conversion_utils as readers
from diffusers.utils import state_dict_utils as converters

from diffkd.models.families import flux, sd, sd3
from diffkd.models.lora_files import to_kohya
from diffkd.models.students import lora

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from memory.networks import SD15, SDXL  # noqa: E402

RANK = 4
TRANSFORMERS = (*sd.LORA_TARGETS, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
CONVOLUTIONS = (
    "conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"
)  # fmt: skip
FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


class Full(NamedTuple):
    """family: of the network. targets: with more layers than its own by default. counts: of layers by
    default and with these. there, absent: names of layers in files."""

    family: Any
    network: Any
    targets: tuple[str, ...]
    counts: tuple[int, int]
    there: tuple[str, ...]
    absent: tuple[str, ...] = ()


def sd35_medium() -> Any:
    return SD3Transformer2DModel(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, qk_norm="rms_norm",
        dual_attention_layers=tuple(range(13)),
    )  # fmt: skip


FULL = {
    "sd": Full(
        sd, lambda: UNet2DConditionModel(**SD15.config), (*TRANSFORMERS, *CONVOLUTIONS), (128, 192 + 86),
        (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
            "lora_unet_down_blocks_2_attentions_1_transformer_blocks_0_attn2_to_out_0",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k",
            "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_v",
            "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj",
            "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_ff_net_2",
            "lora_unet_down_blocks_1_attentions_0_proj_in",
            "lora_unet_mid_block_attentions_0_proj_out",
            "lora_unet_down_blocks_0_resnets_0_conv1",
            "lora_unet_down_blocks_3_resnets_1_conv2",
            "lora_unet_mid_block_resnets_0_time_emb_proj",
            "lora_unet_up_blocks_3_resnets_0_conv_shortcut",
            "lora_unet_down_blocks_0_downsamplers_0_conv",
            "lora_unet_up_blocks_2_upsamplers_0_conv",
        ),
    ),
    "xl": Full(
        sd, lambda: UNet2DConditionModel(**SDXL.config), (*TRANSFORMERS, *CONVOLUTIONS), (560, 722 + 66),
        (
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
            "lora_unet_down_blocks_1_attentions_1_transformer_blocks_1_attn2_to_k",
            "lora_unet_down_blocks_2_attentions_0_transformer_blocks_4_attn2_to_v",
            "lora_unet_down_blocks_2_attentions_1_transformer_blocks_9_ff_net_2",
            "lora_unet_mid_block_attentions_0_transformer_blocks_9_attn1_to_out_0",
            "lora_unet_mid_block_attentions_0_proj_in",
            "lora_unet_up_blocks_0_attentions_1_transformer_blocks_9_ff_net_0_proj",
            "lora_unet_up_blocks_0_attentions_2_transformer_blocks_6_attn1_to_k",
            "lora_unet_up_blocks_1_attentions_2_proj_out",
            "lora_unet_down_blocks_0_resnets_0_conv1",
            "lora_unet_mid_block_resnets_1_conv2",
            "lora_unet_up_blocks_2_resnets_1_time_emb_proj",
            "lora_unet_up_blocks_2_resnets_2_conv_shortcut",
            "lora_unet_down_blocks_0_downsamplers_0_conv",
            "lora_unet_up_blocks_1_upsamplers_0_conv",
        ),
        ("lora_unet_down_blocks_0_attentions_0_proj_in",),  # which has no transformer there
    ),
    "sd3": Full(
        sd3, sd35_medium, (*sd3.LORA_TARGETS, *FORWARD), (243, 337),
        (
            "lora_transformer_transformer_blocks_0_attn_to_q",
            "lora_transformer_transformer_blocks_5_attn_to_k",
            "lora_transformer_transformer_blocks_9_attn_to_v",
            "lora_transformer_transformer_blocks_23_attn_to_out_0",
            "lora_transformer_transformer_blocks_0_attn_add_q_proj",
            "lora_transformer_transformer_blocks_7_attn_add_k_proj",
            "lora_transformer_transformer_blocks_23_attn_add_v_proj",
            "lora_transformer_transformer_blocks_22_attn_to_add_out",
            "lora_transformer_transformer_blocks_12_attn2_to_q",
            "lora_transformer_transformer_blocks_12_attn2_to_out_0",
            "lora_transformer_transformer_blocks_23_ff_net_0_proj",
            "lora_transformer_transformer_blocks_0_ff_net_2",
            "lora_transformer_transformer_blocks_22_ff_context_net_0_proj",
            "lora_transformer_transformer_blocks_0_ff_context_net_2",
        ),
        (
            "lora_transformer_transformer_blocks_23_attn_to_add_out",  # the last block ends the prompt's part
            "lora_transformer_transformer_blocks_23_ff_context_net_2",
            "lora_transformer_transformer_blocks_13_attn2_to_q",
        ),
    ),
    "flux": Full(
        flux, FluxTransformer2DModel, (*flux.LORA_TARGETS, *FORWARD, "proj_mlp", "proj_out"), (266, 419),
        (
            "lora_transformer_transformer_blocks_0_attn_to_q",
            "lora_transformer_transformer_blocks_9_attn_to_v",
            "lora_transformer_transformer_blocks_18_attn_to_out_0",
            "lora_transformer_transformer_blocks_0_attn_add_q_proj",
            "lora_transformer_transformer_blocks_0_attn_add_k_proj",
            "lora_transformer_transformer_blocks_4_attn_add_v_proj",
            "lora_transformer_transformer_blocks_18_attn_to_add_out",
            "lora_transformer_transformer_blocks_0_ff_net_0_proj",
            "lora_transformer_transformer_blocks_18_ff_context_net_2",
            "lora_transformer_single_transformer_blocks_0_attn_to_q",
            "lora_transformer_single_transformer_blocks_20_attn_to_k",
            "lora_transformer_single_transformer_blocks_37_attn_to_v",
            "lora_transformer_single_transformer_blocks_0_proj_mlp",
            "lora_transformer_single_transformer_blocks_37_proj_out",
            "lora_transformer_proj_out",
        ),
    ),
}  # fmt: skip


@cache
def network(name):
    with torch.device("meta"):
        return FULL[name].network()


def weights(name, targets):
    """Of an adapter of that network, as `lora.weights_of` gives them."""
    made = {}
    for key, layer in lora.layers(network(name), targets).items():
        out, *inner = layer.weight.shape
        made[f"{key}.lora_A.weight"] = torch.empty(RANK, *inner, device="meta")
        made[f"{key}.lora_B.weight"] = torch.empty(out, RANK, *(1 for _ in inner[1:]), device="meta")
    return made


@pytest.mark.parametrize("name", FULL)
def test_keys_are_those_of_published_files(name):
    """Their numbers too: 192 and 722 layers are what sd-scripts counts in the transformers of Stable
    Diffusion and SDXL, beside whose residual blocks there are 86 and 66."""
    known = FULL[name]
    prefix = known.family.LORA.kohya
    made = to_kohya(weights(name, known.targets), prefix)
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert {f"{layer}.{part}" for layer in known.there for part in parts} <= made.keys()
    assert not {key.partition(".")[0] for key in made}.intersection(known.absent)
    by_default = to_kohya(weights(name, known.family.LORA_TARGETS), prefix)
    assert (len(by_default), len(made)) == tuple(3 * count for count in known.counts)
    assert {made[key].item() for key in made if key.endswith(".alpha")} == {RANK}
    if name in ("sd", "xl"):  # a convolution is one of its size to the rank, then one of 1x1
        assert len(to_kohya(weights(name, TRANSFORMERS), prefix)) == 3 * {"sd": 192, "xl": 722}[name]
        conv = "lora_unet_down_blocks_0_resnets_0_conv1"
        assert made[f"{conv}.lora_down.weight"].shape == (RANK, 320, 3, 3)
        assert made[f"{conv}.lora_up.weight"].shape == (320, RANK, 1, 1)
        projection = made["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"]
        assert projection.shape == ((1280, RANK, 1, 1) if name == "sd" else (1280, RANK))


@pytest.mark.parametrize("name", FULL)
def test_diffusers_writes_the_same(name):
    """By its own conversion, which has the prefix of UNets alone."""
    known = FULL[name]
    raw = weights(name, known.targets)
    prefixed = {f"{known.family.LORA.prefix}.{key}": value for key, value in raw.items()}
    theirs = converters.convert_state_dict_to_kohya(converters.convert_all_state_dict_to_peft(prefixed))
    if name not in ("sd", "xl"):
        theirs = {f"lora_{key}": value for key, value in theirs.items()}
    ours = to_kohya(raw, known.family.LORA.kohya)
    assert theirs.keys() == ours.keys()
    for key, value in ours.items():
        assert theirs[key] == value if key.endswith(".alpha") else theirs[key] is value, key


@pytest.mark.parametrize("name", ["sd", "xl", "flux"])
def test_diffusers_reads_them_back(name):
    """Every layer by its name, of UNets with convolutions. It has no reader of Stable Diffusion 3's; its
    reader of Flux knows the attention."""
    known = FULL[name]
    targets = known.family.LORA_TARGETS if name == "flux" else known.targets
    raw = weights(name, targets)
    kohya = to_kohya(raw, known.family.LORA.kohya)
    if name == "flux":
        found = readers._convert_kohya_flux_lora_to_diffusers(dict(kohya))
        assert {key: value.shape for key, value in found.items()} == {
            f"transformer.{key}": value.shape for key, value in raw.items()
        }
        return
    state, alphas = readers._convert_non_diffusers_lora_to_diffusers(dict(kohya))
    found = converters.convert_unet_state_dict_to_peft(state)
    assert found.keys() == {f"unet.{key}" for key in raw}
    assert all(found[f"unet.{key}"] is value for key, value in raw.items())
    assert len(alphas) == len(raw) / 2 and {*alphas.values()} == {RANK}
