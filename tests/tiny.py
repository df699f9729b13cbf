"""Networks small enough to train in a test."""

from __future__ import annotations

import torch

from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule
from diffkd.models.unet import UNet2D


def student(
    classes: int | None,
    prediction: str,
    schedule: Schedule,
    *,
    channels: int = 1,
    size: int = 8,
    clip: float | None = None,
    steps: int | None = 4,
    sampler: str = "ddim",
    seed: int = 0,
) -> Denoiser:
    """A UNet of two resolutions, random but far from initialisation, where outputs are near zero."""
    torch.manual_seed(seed)
    network = UNet2D(channels=[8, 16], norm_groups=4).build((channels, size, size), classes)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    denoiser = Denoiser(
        network, schedule, prediction, num_classes=classes, clip=clip, steps=steps, sampler=sampler
    )
    return denoiser.eval()
