"""The processes of a launcher that work together, or a single one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, reduce
from torch import Tensor

from diffkd.errors import UserError
from diffkd.io.naming import called
from diffkd.io.text import reason

DEVICE = "ACCELERATE_TORCH_DEVICE"  # names the device of every process
USE_CPU = "ACCELERATE_USE_CPU"


def usable_device(name: str) -> torch.device:
    """The device called `name` on the command line. Raises UserError where it cannot be used."""
    return _opened(name, f"{called('device')} {name!r}", "try cpu")


def _opened(name: str, given: str, remedy: str) -> torch.device:
    """The device, once something was on it. given: how the user named it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"{given} cannot be used ({reason(error)}); {remedy}") from error
    return device


def launched(cpu: bool) -> PartialState:
    """The process among those of a launcher. cpu: whether they have no accelerator, or shall not use it.

    Raises UserError where environment variables name a device or a place that does not exist.
    """
    named = os.environ.get(DEVICE)
    if named:
        _opened(named, f"{DEVICE}={named}", "unset it")
    try:
        return PartialState(cpu=cpu)
    except ValueError as error:
        PartialState._reset_state()
        raise UserError(
            f"the environment variables of a launcher do not fit together ({reason(error)}); unset RANK, "
            "LOCAL_RANK and WORLD_SIZE, or start several processes by torchrun or accelerate launch"
        ) from error


@contextmanager
def on_device(device: torch.device | str | None) -> Iterator[None]:
    """While it lasts, accelerate chooses this device; with None the one that it would choose anew, whatever
    it had to choose before: a command chooses once, and a notebook goes on for days. Of several processes
    the launcher says it. Raises UserError for a device that cannot be used.
    """
    if os.environ.get("RANK"):
        yield
        return
    before = {name: os.environ.get(name) for name in (DEVICE, USE_CPU)}
    if device is not None:
        os.environ[DEVICE] = str(usable_device(str(device)))
        os.environ[USE_CPU] = str(torch.device(device).type == "cpu").lower()
    _forget_others()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        _forget_others()


def _forget_others() -> None:
    """What accelerate chose is forgotten where it would choose another device now; else it stays, as somebody
    else's Accelerator may share it."""
    chosen = PartialState._shared_state.get("device")
    if chosen is None:
        return
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    on_cpu = found is None or os.environ.get(USE_CPU, "").lower() == "true"
    wanted = torch.device(os.environ.get(DEVICE) or ("cpu" if on_cpu else str(found)))
    if chosen.type != wanted.type or wanted.index not in (None, chosen.index):
        AcceleratorState._reset_state(reset_partial_state=True)


class Processes:
    """This process is `rank` of `world`. device: its own, by default accelerate's choice."""

    def __init__(self, device: torch.device | str | None = None) -> None:
        """Raises UserError for a device that cannot be used, and for one named for several processes."""
        if device is not None:
            device = usable_device(str(device))
        # Without cpu=True, accelerate ignores the launcher on a CPU, and each process would run alone.
        state = launched(cpu=str(device) == "cpu" or not torch.accelerator.is_available())
        self.rank, self.world = state.process_index, state.num_processes
        self.device = torch.device(device or state.device)
        if self.world > 1 and self.device.type != state.device.type:
            name = called("device")
            raise UserError(f"{name} {device} is for one process; the launcher gives each its own")
        if self.world > 1:
            self.device = state.device
        if self.device.type == "mps":
            self.device = torch.device("cpu")  # statistics are float64, which mps lacks
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # CUDA events are recorded on the current device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Barrier: returns once every process has called it."""
        if self.world > 1:
            PartialState().wait_for_everyone()

    def agree(self, value: Any) -> Any:
        """The main process's value, in every process; all of them must call it."""
        values = [value]
        if self.world > 1:
            broadcast_object_list(values)
        return values[0]

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, each of which must call it."""
        if self.world == 1:
            return tensor
        total: Tensor = reduce(tensor.to(self.device), reduction="sum")
        return total.to(tensor.device)
