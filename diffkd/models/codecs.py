"""Autoencoders of latent models, as stock pipelines use them."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import diffusers
import torch
from torch import Tensor

from diffkd.errors import UserError
from diffkd.io.text import quoted
from diffkd.models import fingerprints, networks, validation
from diffkd.models.pipeline_files import variants_of, weights_of
from diffkd.models.source import Source

SUPPORTED = ("AutoencoderKL", "AutoencoderTiny")  # by most pipelines
OF_FRAMES = "AutoencoderKLQwenImage"  # of videos, of which an image is the one frame
LARGEST_WHOLE = 2048  # pixels a side of an image that is encoded or decoded in one piece
AT_ONCE = 1024**2  # pixels that are encoded or decoded in one call


def at_once(images: Tensor, factor: int = 1) -> int:
    """How many of these images, or latents of this factor, go through a network in one call: as many as take
    the memory of one of 1024x1024."""
    height, width = images.shape[-2:]
    return max(1, AT_ONCE // (height * width * factor**2))


class Autoencoder:
    """The codec of a pipeline's autoencoder: latents are scaled by its scaling factor, or normalised by its
    means and standard deviations where it has them. Its weights are read when it is first used, in float32.

    only: height and width of the only latents that the pipeline's network takes, None for one that takes any.
    patch: latents a side of the network's tokens. largest: latents a side that it has positions for. shifted:
    whether the pipeline takes the shift factor off before it scales, and has no use for means. normalised:
    whether it goes by means and standard deviations where the config has them. kinds: classes that the
    pipeline works with. component: what it calls its autoencoder. unit: whether it is given and makes images
    in [0, 1], as EDM2's is, and not in [-1, 1].
    """

    def __init__(
        self,
        source: Source,
        only: tuple[int, int] | None = None,
        *,
        patch: int = 1,
        largest: int | None = None,
        shifted: bool = False,
        normalised: bool = True,
        kinds: tuple[str, ...] = SUPPORTED,
        component: str = "vae",
        unit: bool = False,
    ) -> None:
        self.source, self.only, self.patch, self.largest, self.unit = source, only, patch, largest, unit
        entry = source.index.get(component)
        kind = entry[-1] if isinstance(entry, list) and len(entry) == 2 else None
        if kind not in kinds:
            raise UserError(
                f"{source.name} has an autoencoder of type {quoted(entry)}, which is not supported; use "
                f"{' or '.join(kinds)}"
            )
        self.name, self.place, self.kind = source.name, source.folder / component, getattr(diffusers, kind)
        self.variant = source.variant if source.variant in variants_of(self.place) else None
        with networks.readable(self.place, self.name):
            validation.check_network(self.kind, self.place, self.name, variant=self.variant, whole=True)
        self.device = torch.device("cpu")
        config = networks.config_of(self.place, self.kind)
        self.of_frames = kind == OF_FRAMES
        if self.of_frames:
            self.factor, self.channels = 2 ** len(config["temperal_downsample"]), config["z_dim"]
        else:
            widths = config.get("block_out_channels") or config.get("encoder_block_out_channels")
            self.factor = 2 ** (len(widths or ()) - 1)
            self.channels = config.get("vq_embed_dim") or config["latent_channels"]  # of a VQModel's codes
        self.image_channels = config["in_channels"] if not self.of_frames else 3
        if self.image_channels not in (1, 3) or config.get("out_channels", 3) != self.image_channels:
            raise UserError(
                f"{self.name}: {self.place / 'config.json'} has in_channels {quoted(self.image_channels)} "
                f"and out_channels {quoted(config.get('out_channels'))}; supported are 3 of each, or 1 for "
                "grey"
            )
        self.scaling = config.get("scaling_factor", 1.0)
        if type(self.scaling) not in (int, float) or not 0 < self.scaling < math.inf:
            raise UserError(
                f"{self.name}: {self.place / 'config.json'} has scaling_factor {quoted(self.scaling)}, which "
                "is not a number above 0; repair it"
            )
        self.shift = self._shift(config) if shifted else 0.0
        self.statistics = self._statistics(config) if normalised and not shifted else None
        passed_over = not normalised and config.get("latents_std") is not None
        self.read_as = "shifted" if shifted else "scaled" if passed_over else ""
        self.read_as += " of [0, 1]" if unit else ""

    def _shift(self, config: dict[str, Any]) -> float:
        shift = config.get("shift_factor")
        if isinstance(shift, bool) or not isinstance(shift, int | float) or not math.isfinite(shift):
            raise UserError(
                f"{self.name}: {self.place / 'config.json'} has shift_factor {quoted(shift)}, which is no "
                "number, and its pipeline adds it; set it, to 0.0 for none"
            )
        return float(shift)

    def _statistics(self, config: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        """Means and standard deviations of the channels, (C, 1, 1) each, where the config has both."""
        given = [config.get(key) for key in ("latents_mean", "latents_std")]
        if given[0] is None or given[1] is None:
            return None
        if not all(isinstance(values, list) and len(values) == self.channels for values in given):
            raise UserError(
                f"{self.name}: {self.place / 'config.json'} has latents_mean and latents_std that are not "
                f"{self.channels} numbers each; repair it"
            )
        mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in given)
        return mean, std

    @cached_property
    def key(self) -> str:
        """Hash of config and weights, and what is taken of the config where that is not all."""
        _, files = weights_of(self.place, self.name, self.variant)
        return fingerprints.of_files([self.place / "config.json", *files]) + self.read_as

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of an image of this size. Raises UserError where it does not divide, or is
        not the only one."""
        multiple = self.factor * self.patch
        if height % multiple or width % multiple:
            raise UserError(
                f"images of {width}x{height} do not divide by {multiple}, the scale of the "
                f"{'latents' if self.patch == 1 else 'tokens'} of {self.name}; use multiples of it"
            )
        latents = height // self.factor, width // self.factor
        if self.only not in (None, latents):
            own_height, own_width = (side * self.factor for side in self.only)
            raise UserError(
                f"images of {width}x{height} are not of the one size that {self.name} takes and makes; use "
                f"{own_width}x{own_height}"
            )
        if self.largest is not None and max(latents) > self.largest:
            raise UserError(
                f"images of {width}x{height} have more places than {self.name} knows; use up to "
                f"{self.largest * self.factor} pixels a side"
            )
        return self.channels, *latents

    def check_channels(self, taken: int) -> None:
        """Raises UserError where the latents have other channels than the network takes."""
        if self.channels != taken:
            raise UserError(
                f"{self.name} has an autoencoder of {self.channels} channels, and its network takes {taken}; "
                "are they of one model?"
            )

    @cached_property
    def network(self) -> Any:
        network = networks.read_from(self.place, self.name, self.kind, self.variant)
        return network.eval().requires_grad_(False).to(self.device)

    def to(self, device: torch.device) -> None:
        self.device = device
        if self.statistics is not None:
            mean, std = self.statistics
            self.statistics = mean.to(device), std.to(device)
        if "network" in self.__dict__:
            self.network.to(device)

    def close(self) -> None:
        """Frees its weights."""
        self.__dict__.pop("network", None)

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) in [-1, 1] -> mean and standard deviation of their latents, scaled."""
        images = images.to(self.device, torch.float32)
        images = (images + 1) / 2 if self.unit else images
        self._tile(max(images.shape[-2:]))
        parts = [self._encode(some) for some in images.split(at_once(images))]
        mean, std = (torch.cat(values) for values in zip(*parts, strict=True))
        if self.statistics is None:
            return (mean - self.shift) * self.scaling, std * self.scaling
        of_mean, of_std = (values.to(mean) for values in self.statistics)
        return (mean - of_mean) * self.scaling / of_std, std * self.scaling / of_std

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of their latents, as the network gives them."""
        encoded = self.network.encode(images[:, :, None] if self.of_frames else images)
        if hasattr(encoded, "latent_dist"):
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        else:  # no distribution: of an AutoencoderTiny or DC, or of a VQModel, before its codes are looked up
            mean = encoded.latents if hasattr(encoded, "latents") else encoded.latent
            std = torch.zeros_like(mean)
        return (mean[:, :, 0], std[:, :, 0]) if self.of_frames else (mean, std)

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Latents, scaled -> images (B, C, H, W) in about [-1, 1], by the stock pipelines' operations."""
        x0 = x0.to(self.device, torch.float32)
        if self.statistics is None:
            latents = x0 / self.scaling + self.shift
        else:
            mean, std = (values.to(x0) for values in self.statistics)
            latents = x0 * std / self.scaling + mean
        self._tile(max(x0.shape[-2:]) * self.factor)
        return torch.cat([self._decode(some) for some in latents.split(at_once(latents, self.factor))])

    def _tile(self, side: int) -> None:
        """Images of more than LARGEST_WHOLE pixels a side go through in tiles, as stock has them; all others
        whole, whatever went through before."""
        if hasattr(self.network, "use_tiling"):
            (self.network.enable_tiling if side > LARGEST_WHOLE else self.network.disable_tiling)()

    def _decode(self, latents: Tensor) -> Tensor:
        """As the network takes them -> its images."""
        images: Tensor = self.network.decode(
            latents[:, :, None] if self.of_frames else latents, return_dict=False
        )[0]
        images = images[:, :, 0] if self.of_frames else images
        return 2 * images - 1 if self.unit else images
