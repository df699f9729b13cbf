"""A process that is let run until it has come to a place."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path


def wait_for(process: subprocess.Popen[str], path: Path, text: str) -> None:
    """Until the file says so. The process must still be at work then."""
    while process.poll() is None and not (path.exists() and text in path.read_text()):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
