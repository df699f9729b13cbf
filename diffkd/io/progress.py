"""Progress bars with rate and time left, silent where the output is not a terminal; lines on a console."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from diffkd.errors import printable


@contextmanager
def bar(
    console: Console, title: str, total: int, *, shown: bool = True
) -> Iterator[Callable[[int, str], None]]:
    """Yields advance(done, text): the total done so far, and a text beside the bar."""
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}", markup=False),
    )  # fmt: skip
    disable = not (shown and console.is_terminal)
    with Progress(*columns, console=console, disable=disable, transient=True) as progress:
        task = progress.add_task(title, total=total, text="")
        yield lambda done, text: progress.update(task, completed=done, text=text)


def counter(advance: Callable[[int, str], None], processes: int = 1) -> Callable[[int], None]:
    """A function that moves a bar on by so many items of this process, of each of `processes` alike."""
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count * processes
        advance(done, "")

    return add


def say(console: Console, text: str) -> None:
    """One line as it is: no markup, no colours, never wrapped."""
    console.print(printable(text), highlight=False, markup=False, soft_wrap=True)
