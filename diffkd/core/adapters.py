"""Adapters: the few weights beside a network's own that learn in their place (LoRA, Hu et al. 2022).

A layer with weight W becomes W + BA: A (rank, in) is random, B (out, rank) zero at first, W is shared with
every other network of the same base. Which of a network's weights are an adapter's, their names say.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

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


def own(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a module's adapters by name; {} for a module without any."""
    return {name: p for name, p in module.named_parameters() if DOWN in name or UP in name}


def state(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a module: all of its state, or of one with adapters these alone."""
    return {name: p.detach() for name, p in own(module).items()} or module.state_dict()
