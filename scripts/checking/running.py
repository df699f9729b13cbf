"""Parts of a check, each in a process of its own with a limit of time, and the section that they fill."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GRACE = 5.0  # seconds that a part has to end by itself, once it is cut


@dataclass(frozen=True)
class Part:
    """command: run at the root of the repository, unless `absent` says why it is not. seconds: its
    limit. told: makes Markdown of its stdout, whole or cut. partial: whether a part that is cut has done well
    all the same."""

    title: str
    command: Sequence[str]
    seconds: float
    told: Callable[[str], str]
    partial: bool = False
    absent: str = ""


@dataclass(frozen=True)
class Result:
    """wrong: what went wrong, "" for nothing."""

    part: Part
    text: str
    took: float
    wrong: str = ""

    @property
    def markdown(self) -> str:
        if self.part.absent:
            return f"**{self.part.title}**: {self.part.absent}."
        took = f" ({self.took:.0f} s)"
        wrong = f" **{self.wrong[0].upper()}{self.wrong[1:]}.**" if self.wrong else ""
        return f"**{self.part.title}**{took}.{wrong}\n\n{self.text}".rstrip()


def run(part: Part, left: float) -> Result:
    """left: the seconds that all parts together still have."""
    if part.absent:
        return Result(part, "", 0.0)
    limit, started = min(part.seconds, left), time.monotonic()
    if limit <= 0:
        return Result(part, "", 0.0, "no time was left for it")
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            part.command, cwd=ROOT, stdout=stdout, stderr=stderr, text=True, start_new_session=True
        )
        wrong = ""
        try:
            if process.wait(limit):
                wrong = f"it failed with exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            wrong = f"it was cut after {limit:.0f} s"
        finally:
            _end(process)
        said, err = (_content(stream) for stream in (stdout, stderr))
    text = part.told(said)
    if wrong and process.returncode > 0:
        last = next((line for line in reversed(err.splitlines()) if line.strip()), "")
        wrong += f": {last.strip()[:300]}" if last else ""
    cut_well = part.partial and "cut" in wrong and text
    if cut_well:
        text, wrong = f"{text}\n\nThe rest was not measured: {wrong}.", ""
    return Result(part, text, time.monotonic() - started, wrong)


def _content(stream: tempfile._TemporaryFileWrapper[str]) -> str:
    stream.seek(0)
    return stream.read()


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a part, and whatever it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def check(
    parts: Sequence[Part], head: str, seconds: float, keep: Callable[[str], None], say: Callable[[str], None]
) -> bool:
    """Runs all parts; whether all did well. head: of the section. seconds: of all together. keep: is given
    the section after each. say: is told which begins, and how it failed."""
    started, results = time.monotonic(), list[Result]()
    keep(head)
    for part in parts:
        say(f"{part.title} ...")
        results.append(run(part, seconds - (time.monotonic() - started)))
        if results[-1].wrong:
            say(f"{part.title}: {results[-1].wrong}")
        keep("\n\n".join([head, *(result.markdown for result in results)]))
    return not any(result.wrong for result in results)
