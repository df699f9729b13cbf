"""Pipelines from nothing, one file each: the networks of a teacher that `diffkd train` makes.

The config of a kind of pipeline builds its networks, of stock classes, and writes the pipeline once they have
learned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Protocol

from diffkd.core.conditioning import Conditioner
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule
from diffkd.data.images import Images
from diffkd.models.codecs import Autoencoder
from diffkd.models.new.autoencoder import NewAutoencoder


class NewPipeline(Protocol):
    """A pipeline that works in the latents of an autoencoder, to be trained."""

    shifted: ClassVar[bool]  # whether its codec takes the latents' mean off before it scales

    @property
    def autoencoder(self) -> NewAutoencoder:
        """What is trained first."""

    def check(self, images: Images) -> None:
        """Raises UserError for data that it cannot learn from."""

    def conditioner(self, images: Images) -> Conditioner | None:
        """What turns captions into what the network that learns takes; None for labels."""

    def build(
        self,
        latents: tuple[int, int, int],
        images: Images,
        conditioner: Any,
        schedule: Schedule,
        prediction: str,
    ) -> Denoiser:
        """All that learns together, freshly initialised, as a denoiser of latents (C, H, W)."""

    def save(
        self, denoiser: Denoiser, codec: Autoencoder, conditioner: Any, images: Images, folder: Path
    ) -> None:
        """Writes the stock pipeline of the trained parts."""
