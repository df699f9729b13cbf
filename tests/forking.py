"""Processes that know of each other, forked from one that has imported everything, which saves each seconds.

`python -m tests.forking` takes jobs, a line of JSON on stdin each: module, whose main() is run with these
arguments in so many processes, folder, environment, stdout and stderr (files that they write). An exit status
is a line on stdout.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

IMPORTED = (  # what diffkd.cli imports when it needs it
    "cli", "runs.benchmark", "runs.classification.distill", "runs.distill", "runs.evaluate", "runs.stats",
    "generation.sample",
)  # fmt: skip


def together(processes: int, work: Callable[[], object], seconds: float = 300) -> list[int]:
    """Exit statuses of so many processes that do this work, with torchrun's variables.

    As there, the others are told to end when one has failed. They are killed when the time is over.
    """
    end = time.monotonic() + seconds
    port, children = _port(), []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            _end(work)
        children.append(child)
    statuses: dict[int, int] = {}
    while len(statuses) < processes:
        for child in set(children) - statuses.keys():
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                statuses[child] = os.waitstatus_to_exitcode(status)
                if status:
                    for other in set(children) - statuses.keys():
                        os.kill(other, signal.SIGTERM)
        time.sleep(0.01)
    return [statuses[child] for child in children]


def _port() -> int:
    """A free one, below those that systems give for any, which others' connections are given all the time."""
    while True:
        port = random.randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as tried:
            tried.bind(("", port))
            return port


def _end(work: Callable[[], object]) -> NoReturn:
    """Does the work of a child, which does not return into what it is a copy of."""
    status = 1
    try:
        work()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _command(job: dict[str, Any]) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(job["folder"])
    os.environ |= job["environment"]
    sys.path[0] = ""
    sys.argv = [job["module"], *job["arguments"]]
    sys.modules[job["module"]].main()


def serve() -> None:
    for name in IMPORTED:
        importlib.import_module(f"diffkd.{name}")
    for line in sys.stdin:
        job = json.loads(line)
        importlib.import_module(job["module"])
        statuses = together(job["processes"], partial(_command, job))
        print(next(filter(None, statuses), 0), flush=True)


if __name__ == "__main__":
    serve()
