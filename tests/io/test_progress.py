"""Progress: a bar on a terminal, a line a minute elsewhere, or nothing. No test waits."""

from __future__ import annotations

import io
import sys
import threading
import types
from contextlib import contextmanager

import pytest
from rich.console import Console

from diffkd.io import progress


class Time:
    """A clock that moves when it is told to, and the minutes that pass on it."""

    def __init__(self):
        self.now, self.minute = 1000.0, None


@pytest.fixture
def time(monkeypatch):
    time = Time()

    @contextmanager
    def repeated(call, seconds):
        assert seconds == 60
        time.minute = call
        yield

    monkeypatch.setattr(progress, "_repeated", repeated)
    monkeypatch.setattr(progress, "clock", lambda: time.now)
    return time


def console(**kwargs):
    return Console(file=io.StringIO(), width=40, **kwargs)


def test_a_line_a_minute_without_a_terminal(time):
    out = console()
    with progress.bar(out, "4-steps", 5000, unit="updates") as advance:
        time.minute()
        advance(1000, "loss 0.1234, 640 images/s")  # a resumed stage: the first thousand took no time here
        time.minute()
        time.now += 60
        advance(1100, "loss 0.1200, 640 images/s")
        time.minute()
        time.now += 60  # nothing advances for a minute
        time.minute()
    assert out.file.getvalue().splitlines() == [
        "4-steps: 0 of 5,000 updates",
        "4-steps: 1,000 of 5,000 updates, loss 0.1234, 640 images/s",
        "4-steps: 1,100 of 5,000 updates, loss 0.1200, 640 images/s, 39 min left",
        "4-steps: 1,100 of 5,000 updates, loss 0.1200, 640 images/s, 38 min left",
    ]


def test_images_of_several_processes(time):
    out = console()
    with progress.bar(out, "FID of teacher in 100", 500) as advance:
        count = progress.counter(advance, 2)
        for _ in range(3):
            count(20)
            time.now += 30
        time.minute()
    assert out.file.getvalue() == "FID of teacher in 100: 120 of 500 images, 4 min left\n"


def test_a_clock_that_stands_still_gives_no_rate(time):
    out = console()
    with progress.bar(out, "images", 10) as advance:
        advance(1, "")
        advance(2, "")
        time.minute()
    assert out.file.getvalue() == "images: 2 of 10 images\n"


@pytest.mark.parametrize("quiet", [{"shown": False}, {"quiet": True}])
def test_nothing_where_nothing_is_wanted(time, quiet):
    out = console(quiet=quiet.pop("quiet", False))
    with progress.bar(out, "images", 10, **quiet) as advance:
        advance(1, "")
    assert time.minute is None and out.file.getvalue() == ""


def test_a_bar_on_a_terminal_has_no_lines(time):
    out = console(force_terminal=True)
    with progress.bar(out, "4-steps", 10, unit="updates") as advance:
        advance(1, "loss 1")
    assert time.minute is None and "4-steps" in out.file.getvalue()


@pytest.fixture
def display(monkeypatch):
    """IPython's display, which keeps what is below a cell."""
    shown = []
    handle = types.SimpleNamespace(update=lambda bundle, raw: shown.append(bundle))
    module = types.ModuleType("IPython.display")
    module.display = lambda bundle, raw, display_id: shown.append(bundle) or handle
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return shown


def test_a_bar_in_a_notebook_is_drawn_again_in_place(time, display):
    out = console(force_jupyter=True)
    with progress.bar(out, "4-steps <x>", 10, unit="updates") as advance:
        advance(1, "loss 2")
        time.now += 30
        advance(4, "loss <1>")
        time.now += 0.1  # too soon
        advance(5, "loss 0")
    assert time.minute is None and out.file.getvalue() == ""
    plain = [bundle["text/plain"] for bundle in display]
    assert plain[0] == "4-steps <x>: 0 of 10 updates" and plain[2] == "" and len(plain) == 3
    assert display[1]["text/html"] == (
        '4-steps &lt;x&gt; <progress value="4" max="10"></progress> '
        "4 of 10 updates, loss &lt;1&gt;, 1 min left"
    )


def test_a_notebook_without_ipython_has_lines(time, monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    with progress.bar(console(force_jupyter=True), "images", 10):
        assert time.minute is not None


def test_the_thread_calls_until_it_is_over():
    called = threading.Event()
    with progress._repeated(called.set, 0.001):
        assert called.wait(60)
    assert "progress" not in [thread.name for thread in threading.enumerate()]


def test_a_reader_that_is_gone_ends_the_lines_and_nothing_else(capfd):
    called = threading.Event()

    def gone():
        called.set()
        raise BrokenPipeError

    with progress._repeated(gone, 0.001):
        assert called.wait(60)
    assert capfd.readouterr().err == ""


def test_without_a_thread_there_are_no_lines_and_the_work_goes_on(monkeypatch):
    def refused(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    with progress.bar(console(), "images", 10) as advance:
        advance(1, "")
    with pytest.raises(RuntimeError, match="of the work"), progress.bar(console(), "images", 10):
        raise RuntimeError("of the work")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (89, "1 min"), (3569, "59 min"), (3571, "1 h 0 min"),
        (12_000, "3 h 20 min"), (86_400 * 2 + 4 * 3600, "2 d 4 h"), (86_399, "1 d 0 h"),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert progress.duration(seconds) == text
