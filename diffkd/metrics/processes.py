"""The processes of `accelerate launch` that measure together; one, where there is no launcher."""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor


class Processes:
    """rank of world. device: of this process; default accelerate's choice."""

    def __init__(self, device: torch.device | str | None = None) -> None:
        state = PartialState(cpu=True) if str(device) == "cpu" else PartialState()
        self.rank, self.world = state.process_index, state.num_processes
        self.device = state.device if device is None or self.world > 1 else torch.device(device)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over processes, each of which must call it."""
        if self.world == 1:
            return tensor
        total: Tensor = reduce(tensor.to(self.device), reduction="sum")
        return total.to(tensor.device)
