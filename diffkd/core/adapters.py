"""Adapters: the few weights beside a network's own that learn in their place (LoRA, Hu et al. 2022).

A layer with weight W becomes W + BA: A (rank, in) is random, B (out, rank) zero at first, W is shared with
every other network of the same base. Which of a network's weights are an adapter's, their names say; so they
do of an embedding of its steps' length, which has no weight of a base to learn beside, and learns whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from diffkd.core import interval

DOWN, UP = ".lora_A.", ".lora_B."  # in the names of A and of B


@dataclass(frozen=True)
class Adapter:
    """How a denoiser's copies learn, where they share its weights: by adapters of this rank.

    targets: names of the layers that have one, or what these end in. base: the path or hub id of the model
    whose weights are shared; variant: of its weights, None for the plain ones. guidance: the weight baked
    into them once they were read, None for none.
    """

    rank: int
    targets: tuple[str, ...]
    base: str
    variant: str | None = None
    guidance: float | None = None


def is_factor(name: str) -> bool:
    """Whether a weight of this name is an A or a B."""
    return DOWN in name or UP in name


def own(module: nn.Module) -> dict[str, nn.Parameter]:
    """What a module with adapters shares with no other, by name: their weights, and those of an embedding of
    its steps' length (`core.interval`); {} for a module without adapters."""
    named = dict(module.named_parameters())
    if not any(map(is_factor, named)):
        return {}
    return {name: p for name, p in named.items() if is_factor(name) or interval.NAME in name.split(".")}


def state(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a module: all of its state, or of one with adapters its own alone."""
    return {name: p.detach() for name, p in own(module).items()} or module.state_dict()
