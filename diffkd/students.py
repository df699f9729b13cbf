"""A student made from its teacher."""

from __future__ import annotations

import copy

from diffkd.denoiser import Denoiser


def read_as(denoiser: Denoiser, prediction: str | None = None) -> Denoiser:
    """The same network, its output read as another prediction type where given (weights shared)."""
    return Denoiser(
        denoiser.network,
        denoiser.schedule,
        prediction or denoiser.prediction,
        shape=denoiser.shape,
        num_classes=denoiser.num_classes,
        null_label=denoiser.null_label,
        clip=denoiser.clip,
        steps=denoiser.steps,
    )


def copy_of(denoiser: Denoiser, prediction: str | None = None) -> Denoiser:
    """A student of the teacher's own architecture and weights, with a copy of its own to change."""
    return copy.deepcopy(read_as(denoiser, prediction))
