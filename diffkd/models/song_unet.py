"""DDPM++ and NCSN++ of NVlabs' EDM, whose residual blocks halve the variance of their sums, as no stock ones.

Song et al. 2021 (score SDEs, appendix H: "ddpm++" and "ncsn++") as Karras et al. 2022 train them. Weights
have the names that they have there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from diffkd.models.frequencies import Float32Buffers

HALVED = math.sqrt(0.5)  # of a sum of two states of equal variance
EPS = 1e-6  # of every normalisation
EMBEDDED = 4  # width of the embedding of time and label, in model_channels


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=EPS)


class Resampled(nn.Conv2d):
    """A convolution of states that are halved first, or doubled.

    By means of four pixels and by repeats; wide: by the filter 1 3 3 1 along each side (Karras et al. 2020,
    "StyleGAN2"). after: they are halved after the convolution, with zeros around what it makes of zeros.
    """

    def __init__(
        self, inner: int, outer: int, kernel: int, scale: float, *, wide: bool = False, after: bool = False
    ) -> None:
        super().__init__(inner, outer, kernel, padding=kernel // 2)
        self.scale, self.wide, self.after = scale, wide, after

    def forward(self, x: Tensor) -> Tensor:
        if self.after:
            # zeros go a pixel further, so that the filter has what it takes at the edge; the bias comes last
            x = F.conv2d(x, self.weight, padding=self.kernel_size[0] // 2 + int(self.wide))
            return self._halved(x, padding=0) + cast(Tensor, self.bias).to(x.dtype)[:, None, None]
        if self.scale < 1:
            x = self._halved(x, padding=int(self.wide))
        elif self.scale > 1 and self.wide:
            kernel = 4 * self._filter(x)
            x = F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=len(kernel))
        elif self.scale > 1:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return super().forward(x)

    def _halved(self, x: Tensor, padding: int) -> Tensor:
        if not self.wide:
            return F.avg_pool2d(x, 2)
        return F.conv2d(x, self._filter(x), stride=2, padding=padding, groups=x.shape[1])

    def _filter(self, x: Tensor) -> Tensor:
        taps = torch.tensor([1, 3, 3, 1], device=x.device, dtype=x.dtype) / 8
        return torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)


class Frequencies(Float32Buffers):
    """Random frequencies, as they were drawn."""

    freqs: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(count))


class Block(nn.Module):
    """A residual block, and self-attention of one head after it."""

    def __init__(
        self,
        inner: int,
        outer: int,
        embedded: int,
        dropout: float,
        *,
        attention: bool = False,
        scale: float = 1,
        wide: bool = False,
    ) -> None:
        super().__init__()
        self.inner, self.attention = inner, attention
        self.dropout = nn.Dropout(dropout)
        self.norm0 = _norm(inner)
        self.conv0 = Resampled(inner, outer, 3, scale, wide=wide)
        self.affine = nn.Linear(embedded, outer)
        self.norm1 = _norm(outer)
        self.conv1 = nn.Conv2d(outer, outer, 3, padding=1)
        self.skip = None
        if inner != outer or scale != 1:
            self.skip = Resampled(inner, outer, 1, scale, wide=wide)
        if attention:
            self.norm2 = _norm(outer)
            self.qkv = nn.Conv2d(outer, 3 * outer, 1)
            self.proj = nn.Conv2d(outer, outer, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x))) + self.affine(embedding)[:, :, None, None]
        h = self.conv1(self.dropout(F.silu(self.norm1(h))))
        x = HALVED * ((x if self.skip is None else self.skip(x)) + h)
        return HALVED * (x + self._attended(x)) if self.attention else x

    def _attended(self, x: Tensor) -> Tensor:
        """Query, key and value of a channel lie beside each other."""
        batch, channels, height, width = x.shape
        q, k, v = self.qkv(self.norm2(x)).reshape(batch, channels, 3, -1).unbind(2)
        weights = torch.softmax((q.transpose(1, 2) @ k).float() / math.sqrt(channels), -1).to(v.dtype)
        output: Tensor = self.proj((v @ weights.transpose(1, 2)).reshape(batch, channels, height, width))
        return output


class SongUNet(ModelMixin, ConfigMixin):
    """(B, C, H, W), c_noise (B,) and class labels (B,) -> (B, C, H, W), the F of EDM's preconditioning.

    attention: resolutions with attention in every block of the way down and in the last of the way up.
    augment_dim: of the augmentation that it was told of in training; nothing is told here. NCSN++ has all of
    these. fourier: the time is embedded by random frequencies, twice as many. residual: the image itself is
    halved, and added at every resolution of the way down. wide: see `Resampled`.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (2, 2, 2),
        num_blocks: int = 4,
        attention: Sequence[int] = (16,),
        dropout: float = 0.13,
        num_class_embeds: int | None = None,
        augment_dim: int = 0,
        fourier: bool = False,
        residual: bool = False,
        wide: bool = False,
    ) -> None:
        super().__init__()
        embedded = EMBEDDED * model_channels
        told = 2 * model_channels if fourier else model_channels
        if fourier:
            self.map_noise = Frequencies(model_channels)
        if num_class_embeds is not None:
            self.map_label = nn.Linear(num_class_embeds, told)
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, told, bias=False)
        self.map_layer0 = nn.Linear(told, embedded)
        self.map_layer1 = nn.Linear(embedded, embedded)

        def block(inner: int, outer: int, *, attention: bool = False, scale: float = 1) -> Block:
            return Block(inner, outer, embedded, dropout, attention=attention, scale=scale, wide=wide)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        sides = [f"{side}x{side}" for side in (sample_size >> level for level in range(len(channel_mult)))]
        attends = [sample_size >> level in attention for level in range(len(channel_mult))]
        width, image = model_channels, in_channels
        self.enc[f"{sides[0]}_conv"] = nn.Conv2d(in_channels, width, 3, padding=1)
        kept = [width]
        for level, mult in enumerate(channel_mult):
            if level:
                self.enc[f"{sides[level]}_down"] = block(width, width, scale=0.5)
                kept.append(width)
                if residual:
                    own = Resampled(image, width, 3, 0.5, wide=wide, after=True)
                    self.enc[f"{sides[level]}_aux_residual"], image = own, width
            for i in range(num_blocks):
                outer = model_channels * mult
                self.enc[f"{sides[level]}_block{i}"] = block(width, outer, attention=attends[level])
                kept.append(width := outer)
        self.dec[f"{sides[-1]}_in0"] = block(width, width, attention=True)
        self.dec[f"{sides[-1]}_in1"] = block(width, width)
        for level, mult in reversed([*enumerate(channel_mult)]):
            if level < len(channel_mult) - 1:
                self.dec[f"{sides[level]}_up"] = block(width, width, scale=2)
            for i in range(num_blocks + 1):
                outer, last = model_channels * mult, i == num_blocks
                self.dec[f"{sides[level]}_block{i}"] = block(
                    width + kept.pop(), outer, attention=last and attends[level]
                )
                width = outer
        self.dec[f"{sides[0]}_aux_norm"] = _norm(width)
        self.dec[f"{sides[0]}_aux_conv"] = nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        embedding = self._embedded(timestep).to(sample.dtype)
        if class_labels is not None:
            classes = self.map_label.in_features
            given = F.one_hot(class_labels.long(), classes).to(sample.dtype)
            embedding = embedding + self.map_label(given * math.sqrt(classes))
        embedding = F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))
        x, image, kept = sample, sample, list[Tensor]()
        for part in self.enc.values():
            if isinstance(part, Resampled):
                x = kept[-1] = image = HALVED * (x + part(image))
                continue
            x = part(x, embedding) if isinstance(part, Block) else part(x)
            kept.append(x)
        for part in self.dec.values():
            if not isinstance(part, Block):
                x = F.silu(part(x)) if isinstance(part, nn.GroupNorm) else part(x)
                continue
            x = part(x if x.shape[1] == part.inner else torch.cat([x, kept.pop()], 1), embedding)
        return x

    def _embedded(self, time: Tensor) -> Tensor:
        """Sines, then cosines, of frequencies from 1 to 1 / 10000, or of random ones: (B,) -> (B, 2 n)."""
        if self.config.fourier:
            frequencies = 2 * math.pi * self.map_noise.freqs
        else:
            half = self.config.model_channels // 2
            powers = torch.arange(half, device=time.device, dtype=torch.float32) / (half - 1)
            frequencies = (1 / 10000) ** powers
        angles = time.float()[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], 1)
