"""The processes of a launcher that measure together; one, where there is none."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from torch import Tensor

from diffkd.errors import UserError
from diffkd.io.text import reason


def usable_device(name: str) -> torch.device:
    """The device of that name. Raises UserError where it cannot be used."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name!r} cannot be used ({reason(error)}); try cpu") from error
    return device


class Processes:
    """rank of world. device: of this process; default accelerate's choice."""

    def __init__(self, device: torch.device | str | None = None) -> None:
        """Raises UserError for a device that is not here, and for one that is named to several processes."""
        if device is not None:
            device = usable_device(str(device))
        # Without the word, accelerate takes the processes of a launcher on a CPU for strangers.
        state = PartialState(cpu=str(device) == "cpu" or not torch.accelerator.is_available())
        self.rank, self.world = state.process_index, state.num_processes
        self.device = torch.device(device or state.device)
        if self.world > 1 and self.device.type != state.device.type:
            raise UserError(f"--device {device} is for one process; the launcher gives each its own")
        if self.world > 1:
            self.device = state.device
        if self.device.type == "mps":
            self.device = torch.device("cpu")  # it has no float64, which statistics are in
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # whose clock is read

    @property
    def main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """For the others, each of which must call it."""
        if self.world > 1:
            PartialState().wait_for_everyone()

    def agree(self, value: Any) -> Any:
        """The main process's value, in all of them."""
        found = [value]
        if self.world > 1:
            broadcast_object_list(found)
        return found[0]

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over processes, each of which must call it."""
        if self.world == 1:
            return tensor
        total: Tensor = reduce(tensor.to(self.device), reduction="sum")
        return total.to(tensor.device)
