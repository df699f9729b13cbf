"""Tiny UNets of EDM's kind and pipelines around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

SIDE = 8
ROOT = Path(__file__).parents[1]


def network(*, seed: int = 0, **options: Any) -> diffusers.UNet2DModel:
    """A UNet2DModel of a few thousand weights, far from its initialisation, where outputs are near zero."""
    torch.manual_seed(seed)
    config = {
        "sample_size": SIDE, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16),
        "layers_per_block": 1, "norm_num_groups": 4, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8,
    }  # fmt: skip
    made = diffusers.UNet2DModel(**{**config, **options})
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made.eval()


def adm(**options: Any) -> diffusers.UNet2DModel:
    """In the form of ADM, as the published consistency models are: residual blocks halve and double, and the
    time scales and shifts."""
    return network(
        **{
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"), "downsample_type": "resnet",
            "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"), "upsample_type": "resnet",
            "resnet_time_scale_shift": "scale_shift", **options,
        }
    )  # fmt: skip


def save(folder: Path, unet: Any, scheduler: Any) -> Path:
    """A ConsistencyModelPipeline."""
    pipeline = diffusers.ConsistencyModelPipeline(unet=unet, scheduler=scheduler)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def generators(count: int = 3, seed: int = 5) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def noise(count: int = 3, seed: int = 5, channels: int = 3) -> torch.Tensor:
    shape = (1, channels, SIDE, SIDE)
    return torch.cat([torch.randn(shape, generator=one) for one in generators(count, seed)])


def stock(pipeline: Any, steps: int, labels: list[int] | None = None) -> tuple[torch.Tensor, Any]:
    """The last state (B, C, H, W) and the images, uint8 (B, H, W, C), of the stock pipeline's own call."""
    pipeline.set_progress_bar_config(disable=True)
    given, own = [], pipeline.postprocess_image

    def processed(sample, output_type="pil"):
        given.append(sample)
        return own(sample, output_type)

    pipeline.postprocess_image = processed
    images = pipeline(
        3, class_labels=labels, generator=generators(), num_inference_steps=steps, output_type="np"
    ).images
    del pipeline.postprocess_image
    return given[0], torch.from_numpy(images).mul(255).round().int()


def pictures(folder: Path, count: int = 6) -> Path:
    """Images of noise, SIDE pixels a side."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder
