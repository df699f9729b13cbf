"""How far something is, with rate and time left: a bar on a terminal and in a notebook, a plain line a minute
elsewhere."""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

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

EVERY = 60.0  # seconds between two lines
REDRAWN = 0.2  # seconds between two drawings of a notebook's bar, which cross a network
Advance = Callable[[int, str], None]  # the total done so far, and a text beside it
clock = time.monotonic


def bar(
    console: Console, title: str, total: int, *, unit: str = "images", shown: bool = True
) -> AbstractContextManager[Advance]:
    """Gives advance(done, text). Nothing appears where the console is quiet, or `shown` is false."""
    if not shown or console.quiet:
        return _silence()
    if console.is_jupyter:
        return _notebook(console, title, total, unit)
    return (_bar if console.is_terminal else _lines)(console, title, total, unit)


@contextmanager
def _silence() -> Iterator[Advance]:
    yield lambda done, text: None


@contextmanager
def _bar(console: Console, title: str, total: int, unit: str) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total, text="")
        yield lambda done, text: progress.update(task, completed=done, text=text)


@contextmanager
def _notebook(console: Console, title: str, total: int, unit: str) -> Iterator[Advance]:
    """Below the cell, drawn again in place, and gone at the end: by IPython alone, as rich's own bar needs
    widgets that not every notebook has."""
    try:
        from IPython.display import display
    except ImportError:
        with _lines(console, title, total, unit) as line:
            yield line
        return
    pace, drawn = Pace(), clock()

    def bundle(text: str) -> dict[str, str]:
        said = _said(pace, total, unit, text)
        bar = f'<progress value="{pace.done}" max="{total}"></progress>'
        return {
            "text/plain": f"{title}: {said}",
            "text/html": f"{html.escape(title)} {bar} {html.escape(said)}",
        }

    def advance(done: int, text: str) -> None:
        nonlocal drawn
        pace.reached(done)
        if clock() - drawn >= REDRAWN:
            drawn = clock()
            handle.update(bundle(text), raw=True)

    handle = display(bundle(""), raw=True, display_id=True)
    try:
        yield advance
    finally:
        handle.update({"text/plain": "", "text/html": ""}, raw=True)


@contextmanager
def _lines(console: Console, title: str, total: int, unit: str) -> Iterator[Advance]:
    """A line a minute even where nothing advances: one batch can take an hour."""
    pace, latest = Pace(), ""

    def advance(done: int, text: str) -> None:
        nonlocal latest
        latest = text
        pace.reached(done)

    def line() -> None:
        say(console, f"{title}: {_said(pace, total, unit, latest)}")

    with _repeated(line, EVERY):
        yield advance


def _said(pace: Pace, total: int, unit: str, text: str) -> str:
    left = pace.left(total)
    parts = [f"{pace.done:,} of {total:,} {unit}", text, left and f"{left} left"]
    return ", ".join(part for part in parts if part)


@contextmanager
def _repeated(call: Callable[[], None], seconds: float) -> Iterator[None]:
    """Calls it again and again, in a thread of its own."""
    over = threading.Event()

    def loop() -> None:
        while not over.wait(seconds):
            try:
                call()
            except (OSError, ValueError):  # nobody reads any more, as the command's next line finds out
                return

    thread = threading.Thread(target=loop, name="progress", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # a limit on threads: what is worked on matters more than how far it is
        yield
        return
    try:
        yield
    finally:
        over.set()
        thread.join()


class Pace:
    """The rate of something that counts up, from its first report on: what came before it, such as a warm-up
    or the updates of an earlier run, tells nothing."""

    def __init__(self) -> None:
        self.done = 0
        self._first: tuple[int, float] | None = None
        self._last = 0.0

    def reached(self, done: int) -> None:
        self.done, self._last = done, clock()
        if self._first is None:
            self._first = done, self._last

    @property
    def seconds(self) -> float:
        """Between the first report and the last."""
        return self._last - self._first[1] if self._first else 0.0

    @property
    def rate(self) -> float:
        """Items a second; 0 while it is unknown."""
        return (self.done - self._first[0]) / self.seconds if self._first and self.seconds > 0 else 0.0

    def left(self, total: int) -> str:
        """The time until `total`, from now; "" while it is unknown."""
        if self.rate <= 0:
            return ""
        return duration(max(0.0, (total - self.done) / self.rate - (clock() - self._last)))


def duration(seconds: float) -> str:
    """In the two units that matter: 40 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


def rounded(rate: float) -> str:
    """A rate in two digits or more: 0.44, 6.1, 350."""
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"


def counter(advance: Advance, processes: int = 1) -> Callable[[int], None]:
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
