"""Tiny pipelines of the true class-conditional latent transformer, of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

CLASSES = 10
SIDE = 8  # of latents; images are four times as large


def scheduler(prediction: str = "epsilon", **options: Any) -> Any:
    """DiT's own: a linear table, whose stock grid neither starts at its last index nor ends at alpha = 1."""
    given = {"beta_schedule": "linear", "clip_sample": False, "prediction_type": prediction, **options}
    return diffusers.DDIMScheduler(**given)


def autoencoder(**options: Any) -> Any:
    return diffusers.AutoencoderKL(
        **{
            "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
            "block_out_channels": (8, 8, 8), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 32,
            "scaling_factor": 0.18215, **options,
        }
    )  # fmt: skip


def network(*, classes: int = CLASSES, learned: bool = True, **options: Any) -> Any:
    """A DiTTransformer2DModel. learned: whether it predicts a variance, too."""
    return diffusers.DiTTransformer2DModel(
        **{
            "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 3,
            "out_channels": 8 if learned else 4, "sample_size": SIDE, "patch_size": 2,
            "num_embeds_ada_norm": classes, **options,
        }
    )  # fmt: skip


def pipeline(
    *, prediction: str = "epsilon", noise: Any = None, seed: int = 0, vae: Any = None, **options: Any
) -> Any:
    """A whole DiTPipeline for images of 32x32, random but far from initialisation, where it says nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = {"transformer": network(**options), "vae": vae or autoencoder()}
        for part in parts.values():
            for parameter in part.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
    made = diffusers.DiTPipeline(**parts, scheduler=noise or scheduler(prediction))
    for part in parts.values():
        part.eval()
    made.set_progress_bar_config(disable=True)
    return made


def teacher_and_images(folder: Path, *, classes: int = 3, **options: Any) -> None:
    """A v-prediction teacher in `teacher`; in `images` twelve of random pixels, in folders of its classes."""
    made = pipeline(classes=classes, prediction="v_prediction", **options)
    made.save_pretrained(folder / "teacher", safe_serialization=True)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        place = folder / "images" / f"class-{i % classes}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i}.png")
