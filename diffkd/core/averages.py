"""Moving averages of a student's weights, which methods take their targets from."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Moves a copy of the network by one update: its weights become decay * their own + (1 - decay) * the
    network's.

    Of a sharded network each process gathers the whole, for a copy that is not; all call this together.
    """
    for slow, fast in zip(average.parameters(), network.parameters(), strict=True):
        slow.lerp_(fast.full_tensor() if isinstance(fast, DTensor) else fast, 1 - decay)
