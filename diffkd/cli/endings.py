"""How a command ends that does not reach its end: one line on stderr and an exit status, no traceback."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffkd import __version__
from diffkd.errors import Interrupted, UserError, masked, one_line
from diffkd.io.system_errors import chain, explained

UNFORESEEN = 70  # EX_SOFTWARE of sysexits.h
OTHERS = 5.0  # seconds in which a launcher ends the other processes, once one has failed
SHOW = "DIFFKD_TRACEBACK"  # set to 1, every error comes with its traceback
SHOWN = ("torch", "diffusers")  # whose versions a report names


def rank() -> int | None:
    """Of this process among those of a launcher; None where there is none."""
    return int(os.environ["RANK"]) if os.environ.get("RANK", "").isdigit() else None


def say(line: str) -> None:
    print(f"diffkd: {one_line(' '.join(line.split()))}", file=sys.stderr)


def end(error: BaseException) -> int:
    """Says why a command ended, and gives its exit status."""
    if os.environ.get(SHOW, "0") not in ("", "0"):
        traceback.print_exception(error)
    if isinstance(error, Interrupted):
        if not rank():
            why = "stopped, as the time is up" if error.due else "interrupted"
            saved = "a checkpoint is saved, " if error.saved else ""
            say(f"{why}; {saved}the same command resumes it")
        return 0 if error.due else 130
    known = explained(error)
    if known is None and any(isinstance(each, KeyboardInterrupt) for each in chain(error)):
        return 130
    if known is None and rank() is not None and _is_lost_peer(error):
        return _fail(f"another process of this run is gone; its own error says why ({error})", 1)
    if known is None:
        return _fail(unforeseen(error), UNFORESEEN)
    return _fail(str(known), 2 if isinstance(known, UserError) else 1)


def _fail(message: str, status: int) -> int:
    if rank():
        time.sleep(OTHERS)  # what all processes find, the first one says, and the launcher ends the others
    say(f"error: {message}")
    return status


def _is_lost_peer(error: BaseException) -> bool:
    from diffkd.training.launch import is_lost_peer

    return is_lost_peer(error)


# errors that nobody foresaw


def unforeseen(error: BaseException) -> str:
    """The line for an error that is not the user's; its traceback is written to a file of its own."""
    text = " ".join(str(error).split())[:300]
    what = f"unforeseen {type(error).__name__}{text and ': '}{text}; this is a fault in diffkd"
    report = _report(error)
    for folder in _places():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, file = tempfile.mkstemp(".txt", time.strftime("traceback-%Y%m%d-%H%M%S-"), folder)
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(report)
            return f"{what}: please report it with the traceback, which is in {file}"
    print(report, end="", file=sys.stderr)
    return f"{what}: please report it with the traceback above"


def _places() -> Iterator[Path]:
    """Folders for reports, the first that can be written: never the user's data, nor the current folder."""
    home = "" if os.environ.get("HOME") == "" else os.path.expanduser("~/.local/state")
    state = os.environ.get("XDG_STATE_HOME") or home
    if os.path.isabs(state):
        yield Path(state, "diffkd")
    with contextlib.suppress(OSError):
        yield Path(tempfile.gettempdir())


def _report(error: BaseException) -> str:
    """What helps to find the fault. It names the user's files, so only the user may read it (mode 0600)."""
    imported = [f", {name} {sys.modules[name].__version__}" for name in SHOWN if name in sys.modules]
    lines = [
        f"diffkd {__version__}, Python {platform.python_version()}{''.join(imported)}, {platform.platform()}",
        f"command: {' '.join(map(repr, sys.argv))}",
        "".join(traceback.format_exception(error)),
    ]
    return masked("\n".join(lines))


# what Python and libraries would print themselves


@contextmanager
def one_line_each() -> Iterator[None]:
    """Warnings, errors in threads and errors in finalizers are one line each, as everything else is. Hooks
    that somebody else has set, such as a debugger, stay."""
    hooks = sys.unraisablehook, threading.excepthook, logging.raiseExceptions
    logging.raiseExceptions = False
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _unraisable
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _in_thread
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warning
            yield
    finally:
        sys.unraisablehook, threading.excepthook, logging.raiseExceptions = hooks


def _warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    say(f"{category.__name__}: {message}")


def _in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and args.exc_type is not SystemExit:
        name = args.thread.name if args.thread is not None else "?"
        say(f"error in thread {name}: {explained(args.exc_value) or unforeseen(args.exc_value)}")


def _unraisable(args: sys.UnraisableHookArgs) -> None:
    what = getattr(args.object, "__qualname__", None) or type(args.object).__name__
    say(f"{args.err_msg or 'ignored'} ({what}): {args.exc_type.__name__}: {args.exc_value}")


@contextmanager
def stoppable() -> Iterator[None]:
    """A command that is told to end (SIGTERM, or SIGHUP as its terminal closes) first removes what it has
    half written, as for Ctrl-C; told twice, it ends at once. A launcher's processes end at once anyway."""

    def stop(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        say(f"ended by {signal.Signals(number).name}")
        raise KeyboardInterrupt

    handled: list[int] = []
    if rank() is None and threading.current_thread() is threading.main_thread():
        numbers = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))
        handled = [n for n in numbers if n is not None and signal.getsignal(n) is signal.SIG_DFL]
    for number in handled:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)
