"""stdout and stderr that are full, closed or gone: the work ends complete, quietly or with one line."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from diffkd.cli import main
from tests.cli import scene
from tests.refusals import tree

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")


def full() -> Any:
    return FULL.open("w")


def without_reader() -> Any:
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def closed() -> Any:
    return None  # as Python has it for a command that was started with >&-


def narrow() -> Any:
    """Of an encoding without most characters."""
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii")


STREAMS = [pytest.param(full, marks=needs_full), without_reader, closed, narrow]
MOST = [("stats", without_reader), *(("evaluate", stream) for stream in (without_reader, closed, narrow))]


def ended(monkeypatch: pytest.MonkeyPatch, args: tuple[Any, ...], **streams: Any) -> int:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["diffkd", *map(str, args)])
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as stop:
            main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.parametrize(
    ("command", "stream"), [*(pytest.param(c, full, marks=needs_full) for c in scene.ALL), *MOST]
)
def test_the_work_is_complete_whatever_stdout_is(at_scene, monkeypatch, command, stream):
    args = scene.ALL[command]
    out, err = stream(), io.StringIO()
    with closing(out or io.StringIO()):
        code = ended(monkeypatch, args, stdout=out, stderr=err)
    lines = err.getvalue().splitlines()
    assert code == (stream is full), lines
    assert [line for line in lines if "error" in line] == lines[len(lines) - code :]
    if stream is full:
        assert lines[-1].startswith("diffkd: error: stdout could not be written (No space left on device)")
    here = tree(at_scene)
    if command in scene.WRITING:
        made = {"train": "teacher", "distill": "students/1-steps", "benchmark": "benchmark.md"}.get(command)
        assert (f"made/run/{made}" if made else str(args[-1])) in here
    assert [name for name in here if name.endswith((".tmp", ".old"))] == []


@pytest.mark.parametrize("stream", STREAMS)
def test_a_stderr_that_takes_nothing(at_scene, monkeypatch, stream):
    """An error keeps its exit status, and work its result."""
    for args, status in ((("compare", "no", "no"), 2), (scene.WRITING["sample"], 0)):
        gone = stream()
        with closing(gone or io.StringIO()):
            assert ended(monkeypatch, args, stdout=io.StringIO(), stderr=gone) == status
    assert (at_scene / "made/images/000002.png").is_file()


SHELL = [
    ("methods >/dev/full", 1, 1),
    ("methods | true", 0, 0),  # gone before anything is printed
    ("methods | head -1", 0, 0),
    ("methods >&-", 0, 0),
    ("methods >&- 2>&-", 0, 0),
    ("methods <&- >&- 2>&-", 0, 0),
    ("methods 2>/dev/full", 0, 0),
    ("compare no no 2>/dev/full", 2, 0),
    ("compare no no 2>&-", 2, 0),
    ("compare no no >/dev/full 2>&1", 2, 0),
    ("--help >/dev/full", 1, 1),
    ("--help | true", 0, 0),
]


@needs_full
@pytest.mark.parametrize(("words", "status", "lines"), SHELL)
def test_in_a_shell_also_when_python_ends(tmp_path, words, status, lines):
    """What Python flushes at its very end finds nothing to complain about."""
    (tmp_path / "diffkd").write_text(f'#!/bin/sh\nexec {sys.executable} -m diffkd.cli "$@"\n')
    (tmp_path / "diffkd").chmod(0o755)
    command, pipe, rest = words.partition(" |")
    script = f"set -o pipefail; ./diffkd {command} {pipe} {rest}"
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert (ran.returncode, len(ran.stderr.splitlines())) == (status, lines), ran.stderr


def test_a_closed_stdout_is_no_file_of_the_users(tmp_path):
    """The next file that is opened would get the number of stdout, and whatever libraries print there."""
    code = (
        "import os, sys\nfrom diffkd.cli.screen import screens\n"
        "with screens():\n    file = os.open('precious', os.O_WRONLY | os.O_CREAT)\n"
        "    assert file > 2, file\n    os.write(1, b'printed by a library')"
    )
    command = ["bash", "-c", 'exec "$@" <&- >&-', "bash", sys.executable, "-c", code]
    root = Path(__file__).parents[2]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}, check=True, timeout=60)
    assert (tmp_path / "precious").read_bytes() == b""


def test_what_was_measured_is_on_the_screen_before_it_is_written(at_scene, cli, monkeypatch):
    """A disk that is full in the end costs no number."""
    from diffkd.io import files

    def fails(path: Path, *args: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    for command, module in (("benchmark", "diffkd.runs.benchmark.append_json"), ("evaluate", None)):
        with monkeypatch.context() as patch:
            if module:
                patch.setattr(module, fails)
            else:
                patch.setattr(files.os, "replace", fails)
            code, out, err = cli(*scene.WRITING[command])
        assert code == 1 and "FID" in out, (out, err)
        assert len(err.splitlines()) == 1 and "the disk is full" in err
