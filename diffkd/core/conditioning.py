"""Around a network that works in latents or takes prompts: the contracts of codec and conditioner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from diffkd.io.prefetch import to_device

Cond = Mapping[str, Tensor]  # each (B, ...)


class Codec(Protocol):
    """Images to the space that a denoiser works in, and back. It reads its weights when it is first used."""

    @property
    def key(self) -> str:
        """Hash of what decides the latents."""

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Of the latents of an image of this size. Raises UserError for one that does not divide."""

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) in [-1, 1] -> mean and standard deviation of their latents, scaled."""

    def decode(self, x0: Tensor) -> Tensor:
        """Latents, scaled -> images (B, C, H, W) in about [-1, 1]."""

    @property
    def image_channels(self) -> int:
        """Of images: 3, or 1 of grey ones."""

    @property
    def factor(self) -> int:
        """Pixels a side of a latent's place."""

    def to(self, device: torch.device) -> None:
        """Where it computes."""

    def close(self) -> None:
        """Frees its weights."""


class Conditioner(Protocol):
    """Prompts to what a denoiser is conditioned on. It reads its weights when it is first used."""

    @property
    def key(self) -> str:
        """Hash of what decides the embeddings."""

    def embed(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """What the stock pipeline passes on for these prompts: tensors (B, ...), on the CPU. size: height and
        width of the images, where the model is told."""

    def null(self, prompt: str | None = None) -> dict[str, Tensor]:
        """What stands for no prompt, or for a negative one, each (1, ...)."""

    @property
    def example(self) -> dict[str, Tensor]:
        """What it makes of one prompt, as zeros."""

    def to(self, device: torch.device) -> None:
        """Where it computes."""

    def close(self) -> None:
        """Frees its weights."""


def dropped(cond: Cond, null: Cond, share: float, rng: torch.Generator) -> dict[str, Tensor]:
    """The conditioning with this share of the examples replaced by their null, where that is another."""
    other = [key for key in cond if null[key] is not cond[key]]
    if not other or share <= 0:
        return dict(cond)
    mask = torch.rand(len(cond[other[0]]), generator=rng) < share
    found = dict(cond)
    for key in other:
        where = to_device(mask, cond[key].device).reshape(-1, *[1] * (cond[key].ndim - 1))
        found[key] = torch.where(where, null[key], cond[key])
    return found
