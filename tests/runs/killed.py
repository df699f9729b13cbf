"""`python -m tests.runs.killed STAGE UPDATE SIGNAL ARGUMENTS...`: `diffkd` that sends itself a signal then.

After so many updates of the stage; where UPDATE ends with a +, amid the losses of the one that follows. For
the forking server: alone in its group, the process is one that no launcher started.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from diffkd import cli
from diffkd.runs import session
from tests.methods.conformance import Dying
from tests.runs.tiny import signal_at

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _die_amid(name: str, update: int, number: int) -> None:
    run_stage = session.run_stage

    def dying(accelerator: Any, method: Any, stage: Any, *args: Any, **options: Any) -> None:
        if stage.name == name:
            method = Dying(method, update, lambda: os.kill(os.getpid(), number))
        run_stage(accelerator, method, stage, *args, **options)

    session.run_stage = dying


def main() -> None:
    for name in LAUNCHER:
        os.environ.pop(name, None)
    stage, update, number = sys.argv[1:4]
    if update.endswith("+"):
        _die_amid(stage, int(update[:-1]), int(number))
    else:
        signal_at(pytest.MonkeyPatch(), stage, int(update), send=[int(number)])
    sys.argv[1:4] = []
    cli.main()
