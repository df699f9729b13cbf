"""How commands end that do not reach their end: one line and an exit status, whatever was raised."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import re
import signal
import stat
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import typer

from diffkd.cli import endings, main
from diffkd.errors import Interrupted, Unfinished, UserError
from diffkd.runs.reports import tables
from tests.cli import scene


class Panic(BaseException):
    """As PyO3's PanicException, which is no Exception."""


def grouped() -> BaseException:
    try:
        raise RuntimeError("a task failed") from KeyboardInterrupt()
    except RuntimeError as error:
        return error


KNOWN = [
    (UserError("x is wrong"), 2, "x is wrong"),
    (Unfinished("no more"), 1, "no more"),
    (Interrupted(), 130, "the same command resumes it"),
    (KeyboardInterrupt(), 130, None),
    (grouped(), 130, None),
    (BrokenPipeError(32, "Broken pipe"), 1, "Broken pipe"),  # of the work: not what `| head` does to stdout
    (MemoryError(), 1, "out of memory"),
    (PermissionError(13, "Permission denied", "secret"), 2, "secret: permission denied"),
    (OSError(28, "No space left on device"), 1, "the disk is full"),
    (ModuleNotFoundError("No module named 'scipy'"), 2, "No module named 'scipy'"),
]  # fmt: skip
UNFORESEEN = [
    EOFError(), typer.Abort(), typer.Exit(3), typer.BadParameter("not ours"), SystemExit(0),
    SystemExit("bye"), RecursionError("maximum recursion depth exceeded"), AssertionError(), KeyError("x"),
    StopIteration(), GeneratorExit(), asyncio.CancelledError(), concurrent.futures.CancelledError(),
    Panic("index out of bounds"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    Exception("two\nlines\x1b[31m"),
]  # fmt: skip


@pytest.fixture
def ended(monkeypatch, capsys, tmp_path):
    """ended(error) -> (status, stderr) of `diffkd compare`, whose work raises the error."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def run(error: BaseException) -> tuple[Any, str]:
        def raises(*args: Any) -> bool:
            raise error

        monkeypatch.setattr(tables, "compare", raises)
        monkeypatch.setattr(sys, "argv", ["diffkd", "compare", "one.json", "two.json"])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(("error", "status", "says"), KNOWN, ids=lambda value: type(value).__name__)
def test_known_errors(ended, tmp_path, error, status, says):
    code, err = ended(error)
    assert (code, len(err.splitlines())) == (status, 0 if says is None else 1), err
    assert says is None or says in err
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("error", UNFORESEEN, ids=lambda error: type(error).__name__)
def test_an_error_that_nobody_foresaw(ended, tmp_path, error):
    code, err = ended(error)
    line = re.fullmatch(r"diffkd: error: unforeseen (\w+)(.*) is in (\S+)\n", err)
    assert code == 70 and line and line[1] == type(error).__name__ and line[2].isprintable(), err
    report = Path(line[3])
    assert report.parent == tmp_path / "state" / "diffkd"
    assert stat.S_IMODE(report.stat().st_mode) == 0o600
    text = report.read_text()
    assert "Traceback" in text and "'compare' 'one.json'" in text and "in raises" in text


def test_a_report_holds_no_secret(ended):
    _, err = ended(KeyError("https://me:hunter2@host/x"))
    report = Path(err.split()[-1]).read_text()
    assert "hunter2" not in err + report and "***" in report


def test_where_reports_go_when_the_state_folder_takes_none(ended, tmp_path, monkeypatch):
    (tmp_path / "state").write_text("a file")
    monkeypatch.setattr(endings.tempfile, "tempdir", str(tmp_path))
    _, err = ended(KeyError("x"))
    assert Path(err.split()[-1]).parent == tmp_path

    def nowhere(*args: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(endings.tempfile, "mkstemp", nowhere)
    code, err = ended(KeyError("x"))
    assert code == 70 and "Traceback" in err and err.splitlines()[-1].endswith("with the traceback above")


@pytest.mark.parametrize("home", ["", "here"], ids=["empty", "relative"])
def test_where_reports_go_where_there_is_no_home(ended, tmp_path, monkeypatch, home):
    """Services run with an empty HOME: "~" then leads to the root, or a relative one to anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(endings.tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", home)
    _, err = ended(KeyError("x"))
    assert Path(err.split()[-1]).parent == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == [Path(err.split()[-1]).name]


def test_the_traceback_on_demand(ended, monkeypatch):
    for value, shown in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("DIFFKD_TRACEBACK", value)
        code, err = ended(UserError("x is wrong"))
        assert code == 2 and ("Traceback" in err) is shown
        assert err.splitlines()[-1] == "diffkd: error: x is wrong"


def test_an_error_while_importing(ended, monkeypatch, capsys):
    """Also of the command line itself: a package that is missing, or interrupted on its way in."""

    class Fails:
        def __init__(self, error: BaseException) -> None:
            self.error = error

        def find_spec(self, name: str, *args: Any) -> None:
            if name == "diffkd.cli.app":
                raise self.error

    for error, status in ((ImportError("no typer"), 2), (KeyboardInterrupt(), 130), (SyntaxError("x"), 70)):
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "diffkd.cli.app", raising=False)
            patch.setattr(sys, "meta_path", [Fails(error), *sys.meta_path])
            patch.setattr(sys, "argv", ["diffkd", "--version"])
            with pytest.raises(SystemExit) as stop:
                main()
        err = capsys.readouterr().err
        assert stop.value.code == status and len(err.splitlines()) == (status != 130)


def test_threads_and_finalizers_and_warnings_are_one_line_each(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # pytest's own would stay
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)

    class Finalized:
        def __del__(self) -> None:
            raise KeyError("late")

    def fails(error: BaseException) -> None:
        raise error

    with endings.one_line_each():
        for error in (ValueError("first\nsecond"), OSError(28, "No space left"), SystemExit(1)):
            thread = threading.Thread(target=fails, args=(error,), name="worker")
            thread.start()
            thread.join()
        Finalized()
        warnings.simplefilter("always")
        warnings.warn("of a library\nin two lines", UserWarning, stacklevel=1)
    lines = capsys.readouterr().err.splitlines()
    says = ["in thread worker: unforeseen ValueError: first second", "in thread worker: the disk is full",
            "Finalized.__del__): KeyError: 'late'", "UserWarning: of a library in two lines"]  # fmt: skip
    assert len(lines) == len(says)
    for line, words in zip(lines, says, strict=True):
        assert line.startswith("diffkd: ") and words in line
    assert threading.excepthook is threading.__excepthook__


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_encoding_workers_never_see_ctrl_c(tmp_path):
    """Also while they start, when nothing of theirs could handle it."""
    from diffkd.generation.folder_writer import FolderWriter

    writer = FolderWriter(tmp_path / "drawn", "png", workers=1)
    try:
        writer.warm()
        assert writer._pool is not None
        (process,) = writer._pool._processes
        status = Path(f"/proc/{process}/status").read_text()
        blocked = re.search(r"^SigBlk:\s*(\w+)$", status, re.MULTILINE)
        assert blocked and int(blocked[1], 16) >> (signal.SIGINT - 1) & 1
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("command", "name"),
    [*((c, "SIGTERM") for c in ("sample", "sample-npz", "benchmark", "evaluate")), ("stats", "SIGHUP")],
)
def test_a_command_that_is_told_to_end_leaves_nothing_half_written(
    at_scene, cli, monkeypatch, own_signals, command, name
):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    from diffkd.io import files

    real, sent = files.sync, []

    def sync(path: Path) -> None:
        if not sent and (command != "benchmark" or path.name.startswith(".metrics")):
            sent.append(path)
            os.kill(os.getpid(), number)
        real(path)

    monkeypatch.setattr(files, "sync", sync)
    code, _, err = cli(*scene.WRITING[command])
    assert sent and code == 130 and f"diffkd: ended by {name}\n" in err and "Traceback" not in err
    left = [p.name for p in at_scene.rglob(".*") if p.suffix in (".tmp", ".old")]
    assert left == [] and signal.getsignal(number) is before
    monkeypatch.undo()
    monkeypatch.chdir(at_scene)
    assert cli(*scene.WRITING[command]).code == 0  # the next one is not in its way
