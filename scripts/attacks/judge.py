"""Whether what a command did is right, and if not, what is wrong with it."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attacks.base import SECRET, Attack
from attacks.run import Ended

LEFT = re.compile(r"\.(tmp|old|part|partial|incomplete|unfinished)$|^\.lock$|^\.owner|^tmp|^\.tmp")
FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
RAISED = re.compile(r"[\w.]+(Error|Exception|Interrupt|Exit|Warning)\b")
MEMORY = 4 << 30  # bytes


def faults(
    attack: Attack, ended: Ended, before: dict[str, Any], after: dict[str, Any], root: Path
) -> list[str]:
    """What is wrong, a line each; where the same line comes again, the cause is the same.

    before, after: the trees of the attack's folder.
    """
    found = [*_ending(attack, ended, root)] or [*_words(attack, ended)]
    # an output that was written is named as it is called
    shown = ended.stderr + ("" if attack.what.startswith("out is") and ended.status == 0 else ended.stdout)
    if SECRET in shown:
        line = next(line for line in shown.splitlines() if SECRET in line)
        found.append(f"a secret is shown: {line[:100]}")
    if ended.memory > MEMORY:
        found.append(f"{ended.memory >> 20} MiB of memory")
    return found + [*_elsewhere(attack, ended, before, after, root)]


def _ending(attack: Attack, ended: Ended, root: Path) -> Iterator[str]:
    """What is wrong with the exit status and the line that explains it."""
    errors = [line for line in ended.stderr.splitlines() if line.startswith("diffkd: error: ")]
    unsaid = attack.stderr is not None or (ended.status == 1 and attack.silent)
    short_of_memory = ended.status == 1 and "out of memory" in "".join(errors)
    if ended.status in (-signal.SIGALRM, -signal.SIGXCPU):
        yield f"hang: {ended.cpu:.0f} s of CPU time"
    elif ended.status == 70 or "Traceback (most recent call last)" in ended.stderr + ended.stdout:
        yield f"traceback: {_cause(ended, root)}"
    elif ended.status < 0:
        yield f"killed by {signal.Signals(-ended.status).name}"
    elif ended.status not in attack.may and not short_of_memory:
        yield f"exit status {ended.status}: {_last(ended)}"
    elif ended.status == 0 and errors:
        yield f"exit status 0 with an error line: {errors[0][:120]}"
    elif ended.status in (1, 2) and len(errors) != 1 and not unsaid:
        yield f"exit status {ended.status} with {len(errors)} error lines: {_last(ended)}"


def _words(attack: Attack, ended: Ended) -> Iterator[str]:
    """What is wrong with stderr otherwise."""
    lines = ended.stderr.splitlines()
    strange = [line for line in lines if not line.startswith("diffkd: ")]
    if attack.arguments[0] == "fid" and ended.status == 0:
        strange = [line for line in strange if "Warning" in line]  # stdout has the number, stderr its notes
    if strange:
        yield f"noise on stderr: {_counted(strange[0][:120])}"
    elif not all(line.isprintable() for line in lines):
        yield "control characters on stderr"


def _elsewhere(
    attack: Attack, ended: Ended, before: dict[str, Any], after: dict[str, Any], root: Path
) -> Iterator[str]:
    """What was changed outside of the working folder, and what was left behind."""
    for line in ended.outside:
        path = line.split(" ", 1)[1].strip("'\"")
        if not any(path.startswith(name) for name in attack.named):
            yield f"outside: {_counted(line)}"
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    if str(root) not in attack.named:
        yield from (f"changed outside: {name}" for name in changed if name.startswith("outside"))
    left = [key for key in changed if key not in before and LEFT.search(Path(key).name)]
    left += [key for key in changed if key.startswith("tmp/")]
    if left and (ended.status in (0, 2) or (ended.status == 1 and not attack.again)):
        yield f"left behind: {_counted(Path(left[0]).name)}"


def _counted(text: str) -> str:
    """The text without its numbers, so that the same fault is counted as such."""
    return re.sub("[0-9]+", "#", text)


def _last(ended: Ended) -> str:
    return _counted((ended.stderr.splitlines() or ["(nothing on stderr)"])[-1][:160])


def _cause(ended: Ended, root: Path) -> str:
    """The exception and the innermost frame of diffkd's own."""
    text = ended.stderr + ended.stdout
    for name in re.findall(r"(/\S+)", text) if ended.status == 70 else []:
        path = Path(name.rstrip(".,;)"))
        if root in path.parents and path.is_file():
            text = path.read_text(errors="replace")
    frames = [place for place in FRAME.findall(text) if "/diffkd/" in place[0]]
    where = f"{frames[-1][0].rsplit('/diffkd/', 1)[1]}:{frames[-1][2]}" if frames else "?"
    raised = [line for line in text.splitlines() if RAISED.match(line)]
    return f"{raised[-1].split(':')[0] if raised else '?'} in {where}"
