"""The DDPM++ network of NVlabs' EDM, whose residual blocks halve the variance of their sums, as no stock one.

Song et al. 2021 (score SDEs, appendix H: "ddpm++") as Karras et al. 2022 train it. Weights have the names
that they have there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

HALVED = math.sqrt(0.5)  # of a sum of two states of equal variance
EPS = 1e-6  # of every normalisation
EMBEDDED = 4  # width of the embedding of time and label, in model_channels


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=EPS)


class Resampled(nn.Conv2d):
    """A convolution of states that are halved first, by means of four pixels, or doubled, by repeats."""

    def __init__(self, inner: int, outer: int, kernel: int, scale: float) -> None:
        super().__init__(inner, outer, kernel, padding=kernel // 2)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        if self.scale < 1:
            x = F.avg_pool2d(x, 2)
        elif self.scale > 1:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return super().forward(x)


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
    ) -> None:
        super().__init__()
        self.inner, self.attention = inner, attention
        self.dropout = nn.Dropout(dropout)
        self.norm0 = _norm(inner)
        self.conv0 = Resampled(inner, outer, 3, scale)
        self.affine = nn.Linear(embedded, outer)
        self.norm1 = _norm(outer)
        self.conv1 = nn.Conv2d(outer, outer, 3, padding=1)
        self.skip = Resampled(inner, outer, 1, scale) if inner != outer or scale != 1 else None
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
    augment_dim: of the augmentation that it was told of in training; nothing is told here.
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
    ) -> None:
        super().__init__()
        embedded = EMBEDDED * model_channels
        if num_class_embeds is not None:
            self.map_label = nn.Linear(num_class_embeds, model_channels)
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, model_channels, bias=False)
        self.map_layer0 = nn.Linear(model_channels, embedded)
        self.map_layer1 = nn.Linear(embedded, embedded)

        def block(inner: int, outer: int, *, attention: bool = False, scale: float = 1) -> Block:
            return Block(inner, outer, embedded, dropout, attention=attention, scale=scale)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        sides = [f"{side}x{side}" for side in (sample_size >> level for level in range(len(channel_mult)))]
        attends = [sample_size >> level in attention for level in range(len(channel_mult))]
        width = model_channels
        self.enc[f"{sides[0]}_conv"] = nn.Conv2d(in_channels, width, 3, padding=1)
        kept = [width]
        for level, mult in enumerate(channel_mult):
            if level:
                self.enc[f"{sides[level]}_down"] = block(width, width, scale=0.5)
                kept.append(width)
            for i in range(num_blocks):
                own = model_channels * mult
                self.enc[f"{sides[level]}_block{i}"] = block(width, own, attention=attends[level])
                kept.append(width := own)
        self.dec[f"{sides[-1]}_in0"] = block(width, width, attention=True)
        self.dec[f"{sides[-1]}_in1"] = block(width, width)
        for level, mult in reversed([*enumerate(channel_mult)]):
            if level < len(channel_mult) - 1:
                self.dec[f"{sides[level]}_up"] = block(width, width, scale=2)
            for i in range(num_blocks + 1):
                own, last = model_channels * mult, i == num_blocks
                self.dec[f"{sides[level]}_block{i}"] = block(
                    width + kept.pop(), own, attention=last and attends[level]
                )
                width = own
        self.dec[f"{sides[0]}_aux_norm"] = _norm(width)
        self.dec[f"{sides[0]}_aux_conv"] = nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        embedding = self._embedded(timestep).to(sample.dtype)
        if class_labels is not None:
            classes = self.map_label.in_features
            given = F.one_hot(class_labels.long(), classes).to(sample.dtype)
            embedding = embedding + self.map_label(given * math.sqrt(classes))
        embedding = F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))
        x, kept = sample, list[Tensor]()
        for part in self.enc.values():
            x = part(x, embedding) if isinstance(part, Block) else part(x)
            kept.append(x)
        for part in self.dec.values():
            if not isinstance(part, Block):
                x = F.silu(part(x)) if isinstance(part, nn.GroupNorm) else part(x)
                continue
            x = part(x if x.shape[1] == part.inner else torch.cat([x, kept.pop()], 1), embedding)
        return x

    def _embedded(self, time: Tensor) -> Tensor:
        """Sines, then cosines, of frequencies from 1 to 1 / 10000: (B,) -> (B, model_channels)."""
        half = self.config.model_channels // 2
        powers = torch.arange(half, device=time.device, dtype=torch.float32) / (half - 1)
        angles = time.float()[:, None] * (1 / 10000) ** powers
        return torch.cat([angles.sin(), angles.cos()], 1)
