"""The UNets of Stable Diffusion 1.5 and SDXL at full size, as fake tensors: shapes without numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule
from diffkd.models.families import sd
from diffkd.models.unet import to_fast

TOKENS = 77


@dataclass(frozen=True)
class Layout:
    """A UNet by its config, where that is not diffusers' default; size: of its images, in pixels."""

    name: str
    size: int
    config: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.config.get("in_channels", 4), self.size // 8, self.size // 8)

    def network(self) -> Any:
        return to_fast(UNet2DConditionModel(sample_size=self.size // 8, **self.config))

    def cond(self, count: int) -> dict[str, Tensor]:
        """What it takes beside latents, of so many images, zeros."""
        cond = {"encoder_hidden_states": torch.zeros(count, TOKENS, self.config["cross_attention_dim"])}
        if "addition_embed_type" in self.config:
            ids = 6 * self.config["addition_time_embed_dim"]
            pooled = self.config["projection_class_embeddings_input_dim"] - ids
            cond |= {"text_embeds": torch.zeros(count, pooled), "time_ids": torch.zeros(count, 6)}
        return cond

    def denoiser(self, device: str = "meta") -> Denoiser:
        """On the meta device it takes no memory."""
        with torch.device(device):
            network = self.network()
        made = Denoiser(network, Schedule.cosine(1024), "v_prediction", call=sd.call, example=self.cond(1))
        made.set_null(self.cond(1))
        return made


XL = {
    "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SD15 = Layout("SD 1.5", 512, {"cross_attention_dim": 768})
SDXL = Layout("SDXL", 1024, XL)
SMALL = Layout(  # to count with real numbers
    "small", 64,
    {
        "cross_attention_dim": 32, "block_out_channels": (32, 64), "attention_head_dim": 4,
        "norm_num_groups": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1,
    },
)  # fmt: skip


def fake() -> FakeTensorMode:
    """In it tensors have shapes and no numbers, so that a network of any size takes no memory."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def normalised_in_float32(network: nn.Module) -> None:
    """As autocast does it on CUDA, and not on CPUs, where this counts."""
    for module in network.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.register_forward_pre_hook(lambda norm, given: (given[0].float(),))
