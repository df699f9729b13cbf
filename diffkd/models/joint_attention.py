"""The attention of Stable Diffusion 3's blocks where many tokens of the context are alike."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class LastRepeated:
    """An attention processor of diffusers: the last token of the context stands for `count` that are alike.

    Tokens of a context have no positions, so what is alike stays alike in every block, and a key that is
    there `count` times is one whose logit is larger by log(count). The output is that of the whole context,
    up to rounding, at the cost of a short one.
    """

    def __init__(self, count: int) -> None:
        self.bias = math.log(count)

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> tuple[Tensor, Tensor]:
        """hidden_states (B, N, D), encoder_hidden_states (B, M, D): of the image and of the context."""
        of_image = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k, None)
        of_context = (
            (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k, None)
        )  # fmt: skip
        image = _projected(hidden_states, *of_image, attn.heads)
        context = _projected(encoder_hidden_states, *of_context, attn.heads)
        query, key, value = (torch.cat(both, 2) for both in zip(image, context, strict=True))
        bias = query.new_zeros(1, 1, 1, key.shape[2])
        bias[..., -1] = self.bias
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        mixed = mixed.transpose(1, 2).flatten(2)
        made, told = mixed.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        for layer in attn.to_out:
            made = layer(made)
        return made, told if attn.context_pre_only else attn.to_add_out(told)


def _projected(x: Tensor, maps: Any, norms: Any, heads: int) -> list[Tensor]:
    """Query, key and value, each (B, heads, N, D / heads)."""
    made = []
    for linear, norm in zip(maps, norms, strict=True):
        each = linear(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        made.append(each if norm is None else norm(each))
    return made


def repeat_last(transformer: Any, count: int) -> None:
    """Makes the last token of the context of an SD3Transformer2DModel stand for so many, in place."""
    for block in transformer.transformer_blocks:
        block.attn.set_processor(LastRepeated(count))
