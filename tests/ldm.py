"""Tiny pipelines of unconditional latent diffusion, of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from tests import edm

SIDE = 8  # of latents; images are twice as large


def scheduler(prediction: str = "epsilon", **options: Any) -> Any:
    """The published pipelines' own table, on the stock grid, which does not start at its last index."""
    given = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear", "clip_sample": False,
             "prediction_type": prediction, **options}  # fmt: skip
    return diffusers.DDIMScheduler(**given)


def autoencoder(*, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    made = diffusers.VQModel(
        **{
            "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 3, "num_vq_embeddings": 64,
            "sample_size": 16, "scaling_factor": 0.7, **options,
        }
    )  # fmt: skip
    made.quantize.embedding.weight.data = torch.randn(made.quantize.embedding.weight.shape)
    return made.eval()


def pipeline(*, prediction: str = "epsilon", noise: Any = None, vqvae: Any = None, **options: Any) -> Any:
    """A whole LDMPipeline for images of 16x16, far from initialisation."""
    with torch.random.fork_rng():
        parts = {"unet": edm.network(**options), "vqvae": vqvae or autoencoder()}
    made = diffusers.LDMPipeline(**parts, scheduler=noise or scheduler(prediction))
    made.set_progress_bar_config(disable=True)
    return made


def teacher_and_images(folder: Path) -> None:
    """A v-prediction teacher in `teacher`; in `images` eight of random pixels."""
    pipeline(prediction="v_prediction").save_pretrained(folder / "teacher", safe_serialization=True)
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"images/{i}.png")
