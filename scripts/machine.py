"""What every benchmark prints first, and how it waits for a device.

python scripts/machine.py cuda|cpu     # the first alone
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import torch

from diffkd.io.environment import commit


def describe(device: torch.device) -> str:
    """Machine, threads, versions and commit; of a GPU also its driver and CUDA."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else (model[1] if model else platform.machine())
    )
    cuda = f"driver {_driver()}, CUDA {torch.version.cuda}, " if device.type == "cuda" else ""
    return (
        f"{name}, {torch.get_num_threads()} threads, {cuda}torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}, commit {commit()}"
    )


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(asked, capture_output=True, text=True).stdout.split()
    return said[0] if said else "unknown"


def seconds(device: torch.device) -> float:
    """A clock. On a CPU of the process's own time, in which other work on the machine does not count."""
    synchronize(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    kind = sys.argv[1]
    if kind == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device that torch can use; try --device cpu --small")
    print(describe(torch.device(kind)))
