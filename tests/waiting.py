"""The command in a process of its own, as a user starts it, run until it has reached a certain point."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
LAUNCHED = [  # with torchrun, which `accelerate launch` calls
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
    "-m", "diffkd.cli",
]  # fmt: skip


def wait_for(process: subprocess.Popen[str], path: Path, text: str) -> None:
    """Wait until the file contains the text. The process must still be running then."""
    while process.poll() is None and not (path.exists() and text in path.read_text()):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
