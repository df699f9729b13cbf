"""`python -m tests.runs.killed STAGE UPDATE SIGNAL ARGUMENTS...`: `diffkd` that sends itself a signal then.

For the forking server: alone in its group, the process is one that no launcher started.
"""

from __future__ import annotations

import os
import sys

import pytest

from diffkd import cli
from tests.runs.tiny import signal_at

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def main() -> None:
    for name in LAUNCHER:
        os.environ.pop(name, None)
    stage, update, number = sys.argv[1:4]
    signal_at(pytest.MonkeyPatch(), stage, int(update), send=[int(number)])
    sys.argv[1:4] = []
    cli.main()
