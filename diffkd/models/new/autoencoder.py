"""A new AutoencoderKL, by its config."""

from __future__ import annotations

from typing import Annotated

from diffusers import AutoencoderKL
from pydantic import Field

from diffkd.errors import UserError
from diffkd.io.config import Strict

Widths = Annotated[list[Annotated[int, Field(ge=1, le=1 << 14)]], Field(min_length=1)]


class NewAutoencoder(Strict):
    """The config of a new AutoencoderKL."""

    channels: Widths = Field([32, 64, 64], description="at each resolution, each half the size of the last")
    layers: int = Field(1, ge=1, le=100, description="residual blocks at each resolution")
    latent_channels: int = Field(4, ge=1, le=64, description="of the latents")
    norm_groups: int = Field(8, ge=1, description="groups of group normalisation; divides all channels")

    @property
    def factor(self) -> int:
        """Pixels a side of a latent's place."""
        return 1 << (len(self.channels) - 1)

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raises UserError where images (C, H, W) do not divide, or are neither grey nor RGB."""
        channels, height, width = shape
        if channels not in (1, 3):
            raise UserError(f"images of {channels} channels are not grey or RGB; set data.channels to 1 or 3")
        if height % self.factor or width % self.factor:
            halved = len(self.channels) - 1
            raise UserError(
                f"model.autoencoder.channels {self.channels} halve {halved} times, and images of "
                f"{width}x{height} do not divide by {self.factor}; use fewer, or images of another size"
            )

    def build(self, shape: tuple[int, int, int]) -> AutoencoderKL:
        """Freshly initialised, for images (C, H, W)."""
        levels = len(self.channels)
        return AutoencoderKL(
            in_channels=shape[0], out_channels=shape[0],
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(self.channels), layers_per_block=self.layers,
            latent_channels=self.latent_channels, norm_num_groups=self.norm_groups, sample_size=shape[1],
            mid_block_add_attention=False,
        )  # fmt: skip
