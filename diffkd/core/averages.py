"""Moving averages of a student's weights, which methods take their targets from."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from diffkd.core import adapters


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Moves a copy of the network by one update: its weights become decay * their own + (1 - decay) * the
    network's; of networks that share their base those of the adapters.

    Of a sharded network each process gathers the whole, for a copy that is not; all call this together.
    """
    pair = [adapters.own(net).values() or net.parameters() for net in (average, network)]
    for slow, fast in zip(*pair, strict=True):
        slow.lerp_(fast.full_tensor() if isinstance(fast, DTensor) else fast, 1 - decay)
