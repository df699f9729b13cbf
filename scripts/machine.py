"""What every benchmark prints first, and how it waits for a device."""

from __future__ import annotations

import platform
import re
import time
from pathlib import Path

import diffusers
import torch

from diffkd.io.environment import commit


def describe(device: torch.device) -> str:
    """Machine, threads, versions and commit."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else (model[1] if model else platform.machine())
    )
    return (
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}, commit {commit()}"
    )


def seconds(device: torch.device) -> float:
    """A clock. On a CPU of the process's own time, in which other work on the machine does not count."""
    synchronize(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
