"""Networks that take lists, or count what a prompt's mask holds, as functions of tensors alone.

The blocks are the stock network's own. What lists tell it, masks and tables of rotary embeddings tell here:
where it leaves padding out, that stays, and no token attends to it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffkd.core.conditioning import Cond
from diffkd.core.denoiser import Denoiser
from diffkd.models import packing
from diffkd.models.families import lumina2, qwen_image, z_image
from diffkd.models.flow_pipelines import THOUSAND
from diffkd.models.masked_prompts import MASK, STATES

ROUND = 32  # tokens, of which Z-Image has a whole number, of its image and of its prompt


class Pairs:
    """Complex numbers as pairs of real ones, (..., 2), which ONNX has too: rotary embeddings, and what they
    turn. It has what stock networks do with these, and no more."""

    def __init__(self, pairs: Tensor) -> None:
        self.pairs = pairs

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is torch.view_as_real, f"{function} of a rotary embedding"
        return args[0].pairs

    def unsqueeze(self, dim: int) -> Pairs:
        """dim: from the front."""
        assert dim >= 0
        return Pairs(self.pairs.unsqueeze(dim))

    def __mul__(self, other: Pairs) -> Pairs:
        (a, b), (c, d) = self.pairs.unbind(-1), other.pairs.unbind(-1)
        return Pairs(torch.stack([a * c - b * d, a * d + b * c], -1))


class RealRotary(TorchFunctionMode):
    """Within it, what a network views as complex is `Pairs`."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.view_as_complex:
            return Pairs(*args)
        return function(*args, **(kwargs or {}))


class Lumina2(nn.Module):
    """`lumina2.call` of latents of one size and prompts of one width."""

    first: Tensor
    text: Tensor
    grid: Tensor

    def __init__(self, network: Any, size: tuple[int, int], tokens: int) -> None:
        super().__init__()
        self.network, self.patch, self.tokens = network, network.config.patch_size, tokens
        first, *others = map(_pairs, network.rope_embedder.freqs_cis)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("text", _joined(first[:tokens], *(table[:1] for table in others)), False)
        self.register_buffer("grid", _grid(others, size, self.patch), False)

    def forward(self, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """As `lumina2.call`."""
        network, mask = self.network, cond[MASK].bool()
        count = mask.sum(1)
        embedded, text = network.time_caption_embed(x_t, 1 - time / THOUSAND, cond[STATES])
        of_text = self.text[None].expand(x_t.shape[0], -1, -1, -1)
        for layer in network.context_refiner:
            text = layer(text, mask, Pairs(of_text))

        image = network.x_embedder(_tokens(x_t, self.patch))
        of_image = _joined(self.first[count][:, None], self.grid[None])
        for layer in network.noise_refiner:
            image = layer(image, None, Pairs(of_image), embedded)

        prompt = torch.arange(self.tokens, device=mask.device) < count[:, None]
        kept = torch.cat([prompt, torch.ones_like(image[..., 0], dtype=torch.bool)], 1)
        both, rotary = torch.cat([text, image], 1), Pairs(torch.cat([of_text, of_image], 1))
        for layer in network.layers:
            both = layer(both, kept, rotary, embedded)
        return -_image(network.norm_out(both[:, self.tokens :], embedded), x_t.shape, self.patch)


class ZImage(nn.Module):
    """`z_image.call` of latents of one size and prompts of one width.

    A prompt is filled up to a multiple of 32 tokens by one that is learnt. Here padding takes that part, as
    far as it is needed: attention knows tokens by their positions, and not by their order.
    """

    first: Tensor
    grid: Tensor
    origin: Tensor

    def __init__(self, network: Any, size: tuple[int, int], tokens: int) -> None:
        super().__init__()
        self.network, self.patch = network, z_image.PATCH
        rope = network.rope_embedder
        made = rope.precompute_freqs_cis(rope.axes_dims, rope.axes_lens, theta=rope.theta)
        first, *others = map(_pairs, made)
        grid = _grid(others, size, self.patch)
        self.count, self.idle, self.padding = len(grid), -len(grid) % ROUND, -tokens % ROUND
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("grid", grid, False)
        self.register_buffer("origin", _joined(*(table[:1] for table in others)), False)

    def forward(self, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """As `z_image.call`."""
        network, way = self.network, f"{self.patch}-1"
        embedded = network.t_embedder((THOUSAND - time) / THOUSAND * network.t_scale).type_as(x_t)
        mask = nn.functional.pad(cond[MASK].bool(), (0, self.padding))
        states = nn.functional.pad(cond[STATES], (0, 0, 0, self.padding))
        count = mask.sum(1, keepdim=True)
        filled = (count + ROUND - 1) // ROUND * ROUND
        place = torch.where(mask, mask.long().cumsum(1), count + (~mask).long().cumsum(1))

        image = network.all_x_embedder[way](_tokens(x_t, self.patch))
        image = torch.cat([image, network.x_pad_token.expand(x_t.shape[0], self.idle, -1)], 1)
        of_image = _joined(self.first[filled + 1], self.grid[None])
        of_idle = _joined(self.first[:1], self.origin)[None].expand(x_t.shape[0], self.idle, -1, -1)
        of_image = torch.cat([of_image, of_idle], 1)
        for layer in network.noise_refiner:
            image = layer(image, None, Pairs(of_image), embedded)

        text = torch.where(mask[..., None], network.cap_embedder(states), network.cap_pad_token)
        prompt, of_text = place <= filled, _joined(self.first[place], self.origin[None])
        for layer in network.context_refiner:
            text = layer(text, prompt, Pairs(of_text))

        kept = torch.cat([torch.ones_like(image[..., 0], dtype=torch.bool), prompt], 1)
        both, rotary = torch.cat([image, text], 1), Pairs(torch.cat([of_image, of_text], 1))
        for layer in network.layers:
            both = layer(both, kept, rotary, embedded)
        made = network.all_final_layer[way](both[:, : self.count], c=embedded)
        return -_image(made, x_t.shape, self.patch)


class QwenImage(nn.Module):
    """`qwen_image.call` of latents of one size and prompts of one width: the stock network with its rotary
    embeddings made before, and one size for all images, of which it reads the first of a list as well."""

    def __init__(self, network: Any, size: tuple[int, int], tokens: int) -> None:
        super().__init__()
        self.network = copy.copy(network)
        rows, columns = (side // packing.PATCH for side in size)
        made = network.pos_embed([[(1, rows, columns)]], max_txt_seq_len=tokens, device=network.device)
        self.network._modules = {**network._modules, "pos_embed": _Made(*made)}

    def forward(self, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """As `qwen_image.call`."""
        return qwen_image.call(self.network, x_t, time, cond, listed=1)


class _Made(nn.Module):
    """Rotary embeddings of the image and of the prompt, (N, D) and (L, D), complex."""

    image: Tensor
    text: Tensor

    def __init__(self, image: Tensor, text: Tensor) -> None:
        super().__init__()
        self.register_buffer("image", _pairs(image), persistent=False)
        self.register_buffer("text", _pairs(text), persistent=False)

    def forward(self, *sizes: Any, **how: Any) -> tuple[Pairs, Pairs]:
        return Pairs(self.image), Pairs(self.text)


KINDS: tuple[tuple[type, type[nn.Module]], ...] = (
    (lumina2.NETWORK, Lumina2), (z_image.NETWORK, ZImage), (qwen_image.NETWORK, QwenImage),
)  # fmt: skip


def of(denoiser: Denoiser) -> nn.Module | None:
    """Its call as a module of x_t, time and cond that can be traced; None where the family's own can be."""
    for network, kind in KINDS:
        if isinstance(denoiser.network, network):
            assert denoiser.shape is not None
            return kind(denoiser.network, denoiser.shape[1:], denoiser.example[STATES].shape[1])
    return None


def call(network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """A module of `of` as a family's call."""
    with RealRotary():
        made: Tensor = network(x_t, time, cond)
    return made


def _tokens(x: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, H / patch * W / patch, patch * patch * C)."""
    batch, channels, height, width = x.shape
    cut = x.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def _image(tokens: Tensor, shape: torch.Size, patch: int) -> Tensor:
    """What `_tokens` made of a tensor of this shape, back."""
    batch, channels, height, width = shape
    cut = tokens.reshape(batch, height // patch, width // patch, patch, patch, channels)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(shape)


def _grid(tables: list[Tensor], size: tuple[int, int], patch: int) -> Tensor:
    """The rotary embeddings of the patches of an image, row by row: (N, D, 2)."""
    rows, columns = (side // patch for side in size)
    row, column = tables[0][:rows], tables[1][:columns]
    return _joined(row[:, None], column[None]).flatten(0, 1)


def _joined(*axes: Tensor) -> Tensor:
    """The embeddings of several axes, each (..., D_i, 2), as one: (..., sum of D_i, 2)."""
    lead = torch.broadcast_shapes(*(axis.shape[:-2] for axis in axes))
    return torch.cat([axis.expand(*lead, *axis.shape[-2:]) for axis in axes], -2)


def _pairs(table: Tensor) -> Tensor:
    """Complex (...) -> (..., 2), in float32, the one type that all readers of ONNX have."""
    return torch.view_as_real(table).float()
