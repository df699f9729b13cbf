"""A torchrun for tests, whose processes are forked from one that has imported everything: seconds saved each.

`python -m tests.forking` reads jobs from stdin, one line of JSON each: `module`, whose main() runs with
`arguments` in so many `processes`, their `folder` and `environment`, and the files `stdout` and `stderr` that
they write to. It answers each job with an exit status, one line on stdout.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from torch.distributed import TCPStore

IMPORTED = (  # what diffkd.cli imports when it needs it
    "cli", "runs.benchmark", "runs.classification.distill", "runs.distill", "runs.evaluate", "runs.stats",
    "generation.sample",
)  # fmt: skip

DIGITS = 5  # of a port, as the children read it


def together(processes: int, work: Callable[[], object], seconds: float = 300) -> list[int]:
    """Exit statuses of so many processes that do this work, with the environment variables of torchrun.

    As under torchrun, the parent keeps the store in which they meet, so nobody else can take its port, and
    when one fails the others are told to end. They are killed after `seconds`. The store has a thread, whose
    locks a fork would copy as they are just then: so it begins after the last fork, and a pipe has its port.
    """
    end = time.monotonic() + seconds
    port, told = os.pipe()
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.close(told)
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_USE_AGENT_STORE": "True",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(int(os.read(port, DIGITS))),
            }  # fmt: skip
            os.close(port)
            _end(work)
        children.append(child)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(told, f"{store.port:0{DIGITS}}".encode() * processes)
    os.close(told)
    os.close(port)
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


def _end(work: Callable[[], object]) -> NoReturn:
    """Do the work of a child and exit: it must not return into the copy of its parent."""
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
