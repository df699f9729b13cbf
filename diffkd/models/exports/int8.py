"""A student's pipeline with the weights of its linear layers in 8 bits, as torchao and diffusers save them:
stock opens it, and no pickle is in it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from diffkd.errors import UserError
from diffkd.models import loading, quantization, saving
from diffkd.models.exports import Student

DTYPE = torch.bfloat16  # of all else, as diffusers has it for integers
NEEDS: tuple[str, ...] = ("torchao",)
TAKES = "which is for networks whose weights are mostly in linear layers, as transformers' are"


def fits(student: Student) -> bool:
    """Transformers, and the UNets of Stable Diffusion and SDXL; those of pixels are convolutions."""
    family = saving.family_saving(student.denoiser)
    return family is not None and bool(family.PIPELINES) and "UNet2DModel" not in family.NETWORK.__name__


def write(student: Student, folder: Path) -> dict[str, Any]:
    saving.save(student.denoiser, folder)
    place = folder / ("unet" if (folder / "unet").is_dir() else "transformer")
    kind: Any = saving.family_saving(student.denoiser).NETWORK  # type: ignore[union-attr]
    with loading.quiet(), tempfile.TemporaryDirectory(dir=folder) as beside:
        network = quantization.stock(kind, place)  # whose weights may still be those of the file
        network.save_pretrained(beside, safe_serialization=True)
        shutil.rmtree(place)
        shutil.copytree(beside, place)
    held = quantization.held(network)
    if not held.integers:
        raise UserError(f"{student.name} has no linear layer, so nothing is in 8 bits; use --to fp16")
    return {"export": {"dtype": "bfloat16", "share": round(held.integers / held.all, 4)}, "bytes": held.bytes}
