"""The `diffkd` command.

Exit status: 0 done, or stopped by --stop-after; 1 numbers that differ (evaluate --repeat) or do not compare
(compare), a disk or a memory that is full, output that could not be printed, a process of several that is
gone; 2 a user's error; 70 an error that nobody foresaw; 130 interrupted. Every error is one line on stderr.
"""

from __future__ import annotations

import sys

from diffkd.cli.endings import end, one_line_each, say, stoppable
from diffkd.cli.screen import screens


def main() -> None:
    """Entry point. Whatever it imports or runs may fail: only the standard library is imported before."""
    with screens() as (out, _):
        status = _status()
        if status == 0 and (why := out.lost):
            say(f"error: stdout could not be written ({why}); the work is done, but its output is incomplete")
            status = 1
    sys.exit(status)


def _status() -> int:
    try:
        with one_line_each(), stoppable():
            from diffkd.cli.app import parse

            return parse()() or 0
    except BaseException as error:  # some libraries' errors are no Exception: a panic in Rust, SystemExit
        return end(error)
