"""The processes of a launcher that measure together; one, where there is none."""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor


class Processes:
    """rank of world. device: of this process; default accelerate's choice."""

    def __init__(self, device: torch.device | str | None = None) -> None:
        # Without the word, accelerate takes the processes of a launcher on a CPU for strangers.
        state = PartialState(cpu=str(device) == "cpu" or not torch.accelerator.is_available())
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
