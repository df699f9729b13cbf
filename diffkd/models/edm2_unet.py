"""The network of NVlabs' EDM2, whose operations preserve the magnitude of what they are given.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models"; its equations are
named beside what they say. There a weight is normalised whenever it is used, and some are multiplied by a
gain that is learned; here they are plain weights, which `edm2.network_of` makes of those. Layers have the
names that they have there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from diffkd.errors import UserError
from diffkd.models.frequencies import Float32Buffers

EPS = 1e-4  # of every normalisation
OF_SILU = 0.596  # root mean square of the SiLU of standard normal numbers


def normalized(x: Tensor, dim: int) -> Tensor:
    """x with a root mean square of 1 along a dimension; computed in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=dtype) / math.sqrt(x.shape[dim])
    return x / (norm + EPS).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """Equation 81."""
    return F.silu(x) / OF_SILU


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The share t of b and 1 - t of a (equation 88)."""
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Channels of a and b, which weigh 1 - t and t however many they are (equation 103)."""
    of_a, of_b = a.shape[1], b.shape[1]
    scale = math.sqrt(of_a + of_b) / math.hypot(1 - t, t)
    return torch.cat([scale * (1 - t) / math.sqrt(of_a) * a, scale * t / math.sqrt(of_b) * b], 1)


class Fourier(Float32Buffers):
    """(B,) -> (B, n): cosines of random frequencies and phases, as they were drawn (equation 75)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(count))
        self.register_buffer("phases", 2 * math.pi * torch.rand(count))

    def forward(self, time: Tensor) -> Tensor:
        return math.sqrt(2) * (time[:, None] * self.freqs + self.phases).cos()


class Block(nn.Module):
    """A residual block, and self-attention after it (figure 21).

    encoder: of the way down, where each pixel is normalised first; on the way up none is. scale: of the
    state's sides, first of all. heads: of attention, 0 for none.
    """

    def __init__(
        self,
        inner: int,
        outer: int,
        embedded: int,
        dropout: float,
        *,
        encoder: bool,
        scale: float = 1,
        heads: int = 0,
        balances: tuple[float, float] = (0.3, 0.3),
        clip: float | None = 256,
    ) -> None:
        super().__init__()
        self.encoder, self.scale, self.heads, self.balances, self.clip = encoder, scale, heads, balances, clip
        self.conv_res0 = nn.Conv2d(outer if encoder else inner, outer, 3, padding=1, bias=False)
        self.emb_linear = nn.Linear(embedded, outer, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.conv_res1 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.conv_skip = nn.Conv2d(inner, outer, 1, bias=False) if inner != outer else nn.Identity()
        if heads:
            self.attn_qkv = nn.Conv2d(outer, 3 * outer, 1, bias=False)
            self.attn_proj = nn.Conv2d(outer, outer, 1, bias=False)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if self.scale < 1:
            x = F.avg_pool2d(x, 2)
        elif self.scale > 1:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.encoder:
            x = normalized(self.conv_skip(x), 1)
        scale = 1 + self.emb_linear(embedding)[:, :, None, None]
        y = mp_silu(scale * self.conv_res0(mp_silu(x)))
        y = self.conv_res1(self.dropout(y))
        x = mp_sum(x if self.encoder else self.conv_skip(x), y, self.balances[0])
        if self.heads:
            x = mp_sum(x, self._attended(x), self.balances[1])
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def _attended(self, x: Tensor) -> Tensor:
        """Of cosines: query, key and value have a root mean square of 1 in each head. The three of a channel
        lie beside each other."""
        batch, _, height, width = x.shape
        found = self.attn_qkv(x).reshape(batch, self.heads, -1, 3, height * width)
        q, k, v = (part.transpose(2, 3) for part in normalized(found, 2).unbind(3))
        made = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        output: Tensor = self.attn_proj(made.reshape(x.shape))
        return output


class EDM2UNet(ModelMixin, ConfigMixin):
    """(B, C, H, W), c_noise (B,) and class labels (B,) -> (B, C, H, W), the F of EDM's preconditioning.

    attention: resolutions with attention in every block, of heads of `head_channels`. label_balance,
    concat_balance, res_balance, attn_balance: the share of the label in the embedding, of the way down in
    what is joined to it, of residual branches and of attention. clip: bound of every block's output, None for
    none.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        num_blocks: int = 3,
        attention: Sequence[int] = (16, 8),
        head_channels: int = 64,
        dropout: float = 0.0,
        num_class_embeds: int | None = None,
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip: float | None = 256,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        widths = [model_channels * mult for mult in channel_mult]
        embedded = max(widths)
        self.emb_fourier = Fourier(widths[0])
        self.emb_noise = nn.Linear(widths[0], embedded, bias=False)
        if num_class_embeds is not None:
            self.emb_label = nn.Linear(num_class_embeds, embedded, bias=False)

        def block(inner: int, outer: int, attends: bool = False, **options: Any) -> Block:
            if attends and outer % head_channels:
                raise UserError(f"attention of {outer} channels does not divide by heads of {head_channels}")
            heads, balances = outer // head_channels if attends else 0, (res_balance, attn_balance)
            return Block(
                inner, outer, embedded, dropout, heads=heads, balances=balances, clip=clip, **options
            )

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        sides = [sample_size >> level for level in range(len(widths))]
        names = [f"{side}x{side}" for side in sides]
        attends = [side in attention for side in sides]
        width = widths[0]
        # a channel of ones stands for the biases that no layer has
        self.enc[f"{names[0]}_conv"] = nn.Conv2d(in_channels + 1, width, 3, padding=1, bias=False)
        kept = [width]
        for level, outer in enumerate(widths):
            if level:
                self.enc[f"{names[level]}_down"] = block(width, width, encoder=True, scale=0.5)
                kept.append(width)
            for i in range(num_blocks):
                self.enc[f"{names[level]}_block{i}"] = block(width, outer, attends[level], encoder=True)
                kept.append(width := outer)
        self.dec[f"{names[-1]}_in0"] = block(width, width, True, encoder=False)
        self.dec[f"{names[-1]}_in1"] = block(width, width, encoder=False)
        for level, outer in reversed([*enumerate(widths)]):
            if level < len(widths) - 1:
                self.dec[f"{names[level]}_up"] = block(width, width, encoder=False, scale=2)
            for i in range(num_blocks + 1):
                joined = width + kept.pop()
                self.dec[f"{names[level]}_block{i}"] = block(joined, outer, attends[level], encoder=False)
                width = outer
        self.out_conv = nn.Conv2d(width, in_channels, 3, padding=1, bias=False)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        embedding = self._embedded(timestep, class_labels, sample.dtype)
        x, kept = torch.cat([sample, torch.ones_like(sample[:, :1])], 1), list[Tensor]()
        for part in self.enc.values():
            x = self._computed(part, x, embedding) if isinstance(part, Block) else part(x)
            kept.append(x)
        for name, part in self.dec.items():
            if "block" in name:
                x = mp_cat(x, kept.pop(), self.config.concat_balance)
            x = self._computed(part, x, embedding)
        output: Tensor = self.out_conv(x)
        return output

    def _computed(self, block: nn.Module, x: Tensor, embedding: Tensor) -> Tensor:
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        found: Tensor = (
            self._gradient_checkpointing_func(block, x, embedding) if again else block(x, embedding)
        )
        return found

    def _embedded(self, time: Tensor, labels: Tensor | None, dtype: torch.dtype) -> Tensor:
        embedding: Tensor = self.emb_noise(self.emb_fourier(time).to(dtype))
        classes = self.config.num_class_embeds
        if (labels is None) != (classes is None):
            given_to = "missing for" if labels is None else "given to"
            raise ValueError(f"class_labels are {given_to} a network of {classes or 'no'} classes")
        if labels is not None:
            given = F.one_hot(labels.long(), classes).to(dtype) * math.sqrt(classes)
            embedding = mp_sum(embedding, self.emb_label(given), self.config.label_balance)
        return mp_silu(embedding)
