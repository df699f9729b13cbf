"""stdout and stderr that may be full, closed or gone: the work that prints to them goes on to its end."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.ECONNRESET)  # the reader has seen enough, as `head` has: no error


class Screen:
    """A standard stream that takes everything: what it cannot write is dropped, from the first error on.

    error: that error; None while all is well.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: Exception | None = None
        with contextlib.suppress(AttributeError, ValueError):  # not every stream has an encoding
            stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]

    def write(self, text: str) -> int:
        if self.error is None:
            try:
                self._stream.write(text)
            except (OSError, ValueError) as error:  # ValueError: a stream that was closed
                self._give_up(error)
        return len(text)

    def writelines(self, lines: Iterator[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        if self.error is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """What is still buffered goes nowhere: else Python complains when it flushes it at its end."""
        self.error = error
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())
            self._stream.flush()

    @property
    def lost(self) -> str | None:
        """Why somebody who wanted the output did not get all of it; None where nobody did, or all is well."""
        self.flush()
        if self.error is None or (isinstance(self.error, OSError) and self.error.errno in GONE):
            return None
        return getattr(self.error, "strerror", None) or str(self.error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def screens() -> Iterator[tuple[Screen, Screen]]:
    """(stdout, stderr), which stand in for sys.stdout and sys.stderr. Those that are closed are opened on the
    null device, since the next file that is opened would get their number, and what libraries print to it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        out, err = (
            Screen(stack.enter_context(open(os.devnull, "w")) if stream is None else stream)
            for stream in before
        )
        sys.stdout, sys.stderr = out, err
        try:
            yield out, err
        finally:
            out.flush()
            err.flush()
            sys.stdout, sys.stderr = before
