"""UNet2DConditionModels that attend to nothing, read as the UNet2DModel of the same operations.

Of class labels or of none. No stock pipeline calls such a network: those of prompts give it no labels, and
those of labels give it no prompt, which its class asks for. A UNet2DModel of plain blocks has the same
layers under the same names, but for a second residual block in its middle, which here adds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from diffkd.models import networks
from diffkd.models.source import Source

MID = "UNetMidBlock2D"
SUPPORTED: dict[str, tuple[Any, ...]] = {  # what every UNet2DModel has
    "act_fn": ("silu",),
    "mid_block_scale_factor": (1,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "class_embeddings_concat": (False,),
    "class_embed_type": (None, "timestep"),
    "addition_embed_type": (None,),
    "encoder_hid_dim_type": (None,),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
}
KEPT = (
    "sample_size", "in_channels", "out_channels", "center_input_sample", "flip_sin_to_cos", "freq_shift",
    "down_block_types", "mid_block_type", "up_block_types", "block_out_channels", "layers_per_block",
    "downsample_padding", "dropout", "norm_num_groups", "norm_eps", "resnet_time_scale_shift",
    "time_embedding_dim", "class_embed_type", "num_class_embeds",
)  # fmt: skip


def attends(config: Mapping[str, Any]) -> bool:
    """Whether a block of such a network attends to anything, or is none of those that a UNet2DModel has."""
    blocks = {*config["down_block_types"], *config["up_block_types"]}
    return not blocks <= {"DownBlock2D", "UpBlock2D"} or config["mid_block_type"] not in (MID, None)


def read(source: Source, check: Any) -> UNet2DModel:
    """Of the folder of a network alone. check: as of `networks.read`. Raises UserError as that does, and for
    what no UNet2DModel has."""
    place = source.place_of("unet")
    networks.check_supported(networks.config_of(place, UNet2DConditionModel), source.name, SUPPORTED)
    network = networks.read(source, "unet", UNet2DConditionModel, check)
    with networks.readable(place, source.name):
        return rewritten(network)


def rewritten(network: UNet2DConditionModel) -> UNet2DModel:
    """The UNet2DModel of the same outputs. The second block of its middle is a copy of the first whose last
    layer is zero: it can learn, and until then passes on what it is given."""
    with torch.device("meta"):
        made = UNet2DModel(**{key: network.config[key] for key in KEPT}, add_attention=False)
    weights = network.state_dict()
    first, second = "mid_block.resnets.0.", "mid_block.resnets.1."
    for name in [name for name in weights if name.startswith(first)]:
        last = name.startswith(f"{first}conv2.")
        weights[name.replace(first, second)] = (torch.zeros_like if last else torch.clone)(weights[name])
    made.load_state_dict(weights, assign=True)
    return made.requires_grad_(True)
