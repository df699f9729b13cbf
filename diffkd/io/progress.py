"""Progress bars with rate and time left; silent where the output is no terminal."""

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


@contextmanager
def bar(
    console: Console, title: str, total: int, *, shown: bool = True
) -> Iterator[Callable[[int, str], None]]:
    """Gives advance(done, text)."""
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}", markup=False),
    )  # fmt: skip
    disable = not (shown and console.is_terminal)
    with Progress(*columns, console=console, disable=disable, transient=True) as progress:
        task = progress.add_task(title, total=total, text="")
        yield lambda done, text: progress.update(task, completed=done, text=text)
