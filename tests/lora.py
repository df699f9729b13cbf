"""Students that are adapters, far from what they begin as."""

from __future__ import annotations

from typing import Any

import torch

from diffkd.core import adapters
from diffkd.core.denoiser import Denoiser
from diffkd.models.students.config import Lora


def adapted(
    teacher: Denoiser, *, rank: int = 4, scale: float = 0.1, seed: int = 0, **options: Any
) -> Denoiser:
    """An adapter on this teacher, whose B is random too."""
    student = Lora(kind="lora", rank=rank, **options).build(teacher, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in adapters.own(student.network).values():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return student
