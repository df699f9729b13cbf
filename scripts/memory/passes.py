"""What one forward and backward pass of a network takes: bytes of activations, and multiply-accumulates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from diffkd.models.families import sd
from diffkd.models.sizes import Size, denoiser_size
from memory.live import Live
from memory.networks import Layout, fake, normalised_in_float32

FEW, MORE = 2, 4  # images, of which bytes of one and of none follow


@dataclass(frozen=True)
class Bytes:
    """saved: kept from forward to backward pass, the output and casts of weights included. most: at any time,
    beside weights and their gradients."""

    saved: int
    most: int


def passed(network: Any, layout: Layout, count: int, *, half: bool = True) -> Bytes:
    """Of a pass over so many images. half: under bf16 autocast. Gradients are there before, as from the
    second micro-batch on."""
    x, time, cond = torch.zeros(count, *layout.shape), torch.zeros(count), layout.cond(count)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in network.parameters()]
    with Live([*network.parameters(), *network.buffers(), *gradients, x, time, *cond.values()]) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = sd.call(network, x, time, cond)[0]
        saved = live.now
        torch.autograd.backward(output, torch.zeros_like(output))
    return Bytes(saved, live.most)


@dataclass(frozen=True)
class Pass:
    """fixed, image: the most bytes of activations under bf16 autocast, for none and for each image."""

    fixed: float
    image: float

    @classmethod
    def of(cls, layout: Layout, *, checkpointing: bool) -> Pass:
        with fake():
            network = layout.network().train()
            normalised_in_float32(network)
            if checkpointing:
                network.enable_gradient_checkpointing()
            few, more = (passed(network, layout, count).most for count in (FEW, MORE))
        image = (more - few) / (MORE - FEW)
        return cls(few - FEW * image, image)


def size_of(layout: Layout) -> Size:
    """Parameters, and the multiply-accumulates of a forward pass of one image."""
    return denoiser_size(layout.denoiser())
