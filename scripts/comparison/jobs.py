"""Commands run side by side, each with one thread."""

from __future__ import annotations

import os
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Job:
    """log: takes what the command says, after what earlier ones said."""

    name: str
    command: Sequence[str]
    log: Path


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_by_side(jobs: Sequence[Job], count: int, until: float | None = None) -> list[Job]:
    """Runs them, `count` at a time; those that failed.

    until: by time.monotonic(), after which none is begun, and which `diffkd distill` is told. However this
    ends, the commands end before it: SIGTERM lets them save what they have.
    """
    waiting, failed = deque(jobs), []
    running: dict[subprocess.Popen[bytes], tuple[Job, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < count:
                job, command = waiting[0], list(waiting[0].command)
                waiting.popleft()
                if until is not None:
                    left = int(until - time.monotonic())
                    if left <= 0:
                        continue
                    command += ["--stop-after", f"{left}s"]
                with job.log.open("ab") as log:
                    started = subprocess.Popen(
                        command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **ONE_THREAD}
                    )
                running[started] = job, time.monotonic()
                print(f"{job.name}: {job.log}", flush=True)
            for process in [process for process in running if process.poll() is not None]:
                job, began = running.pop(process)
                end = "ended" if process.returncode == 0 else f"failed ({last_line(job.log)})"
                print(f"{job.name}: {end} after {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
                if process.returncode:
                    failed.append(job)
            time.sleep(0.2)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    return failed


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
