"""An autoencoder that learns: images to latents and back in one call, as processes in step need it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class ThereAndBack(nn.Module):
    """An AutoencoderKL as one function of images (B, 3 or 1, H, W) and noise (B, C, h, w): what is decoded of
    the latents that the noise draws, and their divergence from normal ones, (B,)."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x0: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.vae.encode(x0).latent_dist
        decoded: Tensor = self.vae.decode(latents.mean + latents.std * noise).sample
        return decoded, latents.kl()


class ImageAutoencoder(nn.Module):
    """What the trainer trains: its `network` is replaced by what accelerate makes of it. factor, channels:
    pixels a side of a latent's place, and the latents' channels."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.network: nn.Module = ThereAndBack(vae)
        self.factor, self.channels = 2 ** (len(vae.config.block_out_channels) - 1), vae.config.latent_channels

    def noise_shape(self, x0: Tensor) -> tuple[int, int, int, int]:
        """Of the noise for these images."""
        return len(x0), self.channels, x0.shape[2] // self.factor, x0.shape[3] // self.factor

    def forward(self, x0: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        decoded, divergence = self.network(x0, noise)
        return decoded, divergence
