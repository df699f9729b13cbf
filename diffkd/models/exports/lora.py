"""An adapter for stock diffusers, alone: what load_lora_weights reads, and the student's scheduler."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from diffkd.models import saving
from diffkd.models.exports import Student
from diffkd.models.source import ADAPTER

DTYPE = torch.float32
NEEDS: tuple[str, ...] = ()
TAKES = (
    "which takes a student of kind lora (student: {kind: lora, rank: 32} in its config) of a family whose "
    "stock pipeline loads adapters"
)


def fits(student: Student) -> bool:
    """Where the student's folder is an adapter alone; others are saved whole."""
    return student.denoiser.fused and "scheduler" in student.card.get("lora", {})


def write(student: Student, folder: Path) -> dict[str, Any]:
    shutil.copy(student.folder / ADAPTER, folder / ADAPTER)
    saving.stock_scheduler(student.denoiser).save_pretrained(folder / "scheduler")
    return {"export": {}}
