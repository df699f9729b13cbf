"""An adapter for other programs, alone: with the keys that ComfyUI reads, of UNets A1111 too, and its
scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from diffkd.models import lora_files, saving
from diffkd.models.exports import Student, lora
from diffkd.models.source import ADAPTER

DTYPE = torch.float32
NEEDS: tuple[str, ...] = ()
TAKES = (
    "which takes a student of kind lora (student: {kind: lora, rank: 32} in its config) of a family whose "
    "keys other programs read"
)


def fits(student: Student) -> bool:
    keys = _keys(student)
    return lora.fits(student) and keys is not None and keys.kohya is not None


def _keys(student: Student) -> lora_files.Keys | None:
    """Of the family's files: without kohya's where other programs read none, or those of `lora`."""
    keys: lora_files.Keys | None = getattr(saving.family_saving(student.denoiser), "LORA", None)
    return keys


def write(student: Student, folder: Path) -> dict[str, Any]:
    keys = _keys(student)
    assert keys is not None and keys.kohya is not None
    weights = lora_files.unprefixed(load_file(student.folder / ADAPTER))
    save_file(lora_files.to_kohya(weights, keys.kohya), folder / lora_files.KOHYA, {"format": "pt"})
    saving.stock_scheduler(student.denoiser).save_pretrained(folder / "scheduler")
    return {"export": {"comfy_alone": True} if keys.comfy_alone else {}}
