"""An adapter for other programs, alone: with the keys that ComfyUI and A1111 read, and its scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from diffkd.models import loading, lora_files
from diffkd.models.exports import Student, lora
from diffkd.models.source import ADAPTER

DTYPE = torch.float32
NEEDS: tuple[str, ...] = ()
TAKES = (
    "which takes a student of kind lora (student: {kind: lora, rank: 32} in its config) of a family whose "
    "keys other programs read"
)


def fits(student: Student) -> bool:
    return lora.fits(student) and _prefix(student) is not None


def _prefix(student: Student) -> str | None:
    """Of the family's keys in such files; None where other programs read none, or those of `lora`."""
    keys: lora_files.Keys | None = getattr(loading.family_saving(student.denoiser), "LORA", None)
    return None if keys is None else keys.kohya


def write(student: Student, folder: Path) -> dict[str, Any]:
    prefix = _prefix(student)
    assert prefix is not None
    weights = lora_files.unprefixed(load_file(student.folder / ADAPTER))
    save_file(lora_files.to_kohya(weights, prefix), folder / lora_files.KOHYA, {"format": "pt"})
    loading.stock_scheduler(student.denoiser).save_pretrained(folder / "scheduler")
    return {"export": {}}
