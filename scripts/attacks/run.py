"""One command in a forked process, with limits, and what it did to the disk."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import resource
import signal
import stat
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

CPU, WALL, IDLE = 60, 300, 45  # seconds of one command: of processor time, in all, without doing anything
MEMORY, FILE = 4 << 30, 1 << 30  # bytes: of memory beside what the libraries take, of a file
company: list[int] = []  # processes that an attack started beside the command, and that end by themselves
NOT_BEGUN = 99  # exit status where the attack itself failed
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PATHS = {  # audit events that change the disk, and which of their arguments are paths
    "os.rename": (0, 1), "os.link": (1,), "os.symlink": (1,), "os.remove": (0,), "os.mkdir": (0,),
    "os.rmdir": (0,), "os.truncate": (0,), "os.chmod": (0,), "os.chown": (0,), "os.utime": (0,),
}  # fmt: skip


@dataclass
class Ended:
    """How a command ended: its exit status, or minus a signal, -signal.SIGALRM where the time was up."""

    status: int
    cpu: float
    memory: int
    stdout: str
    stderr: str
    outside: list[str]  # what it tried to change outside its folder


def written(event: str, args: tuple[Any, ...]) -> list[str]:
    """The paths that an audit event is about to change."""
    if event == "open":
        path, _, flags = args
        return [os.fsdecode(path)] if isinstance(path, str | bytes) and flags & WRITES else []
    if event not in PATHS or (isinstance(args[-1], int) and args[-1] > 2):  # relative to an open folder
        return []
    given = [args[i] for i in PATHS[event]]
    return [os.fsdecode(path) for path in given if isinstance(path, str | bytes | os.PathLike)]


def _watch(inside: Sequence[str], log: str) -> None:
    """Log, and forbid, changes to anything but these folders."""
    places = tuple(os.path.realpath(place) + "/" for place in (*inside, "/proc"))
    devices = ("/dev/null", "/dev/full", "/dev/tty")
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        for path in written(event, args):
            if "\0" in path:
                continue
            head, tail = os.path.split(path)
            real = os.path.realpath(path) if event == "open" else os.path.join(os.path.realpath(head), tail)
            if not f"{real}/".startswith(places) and real not in devices:
                os.write(descriptor, f"{event} {real!a}\n".encode())
                raise PermissionError(13, "Permission denied", path)

    sys.addaudithook(hook)


def stream(number: int, encoding: str, errors: str) -> io.TextIOWrapper:
    """As Python opens stdout (1) and stderr (2) at its start."""
    raw = io.BufferedWriter(io.FileIO(number, "w", closefd=False))
    return io.TextIOWrapper(raw, encoding, errors, line_buffering=number == 2)


def _enter(said: Sequence[Path], given: Sequence[str | None], encoding: str) -> None:
    """A session of its own, with its own streams."""
    os.setsid()
    for number in (1, 2):
        os.dup2(
            os.open(given[number - 1] or said[number - 1], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number
        )
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    sys.stdout = stream(1, encoding, "strict")
    sys.stderr = stream(2, encoding, "backslashreplace")
    tempfile.tempdir = None
    os.umask(0o022)


def _limits() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU, CPU + 5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end(status: int) -> NoReturn:
    """As Python ends: threads are waited for, and output that cannot be flushed is an error."""
    threading._shutdown()  # type: ignore[attr-defined]
    for child in company:
        os.waitpid(child, 0)
    try:
        sys.stdout.flush()
    except AttributeError:  # it was closed
        pass
    except (OSError, ValueError) as error:
        status = 120
        sys.stderr.write(f"Exception ignored on flushing sys.stdout: {error!r}\n")
    os._exit(status)


def _work(work: Callable[[], object]) -> NoReturn:
    status = 1
    try:
        work()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    try:
        _end(status)
    finally:
        os._exit(status)


def forked(
    work: Callable[[], object],
    root: Path,
    *,
    folder: Path,
    environment: Mapping[str, str | None] | None = None,
    stdout: str | None = None,
    stderr: str | None = None,
    encoding: str = "utf-8",
    inside: Callable[[], None] | None = None,
    writable: Sequence[str] = (),
) -> Ended:
    """Run work() in a process of its own that may change files below `root` only."""
    said = [root / f"said-{time.monotonic_ns()}.{name}" for name in ("stdout", "stderr", "outside")]
    child = os.fork()
    if child == 0:
        try:
            _enter(said, (stdout, stderr), encoding)
            own = {
                "HOME": str(root / "home"),
                "TMPDIR": str(root / "tmp"),
                "XDG_CACHE_HOME": str(root / "home/.cache"),
            }
            for name, value in {**own, **(environment or {})}.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            time.tzset()
            os.chdir(folder)
            _limits()
            _watch([str(root), *writable], str(said[2]))
            if inside is not None:
                inside()
        except BaseException:
            traceback.print_exc()
            os._exit(NOT_BEGUN)
        _work(work)
    end, worked, since = time.monotonic() + WALL, "", time.monotonic()
    while True:
        ended, status, used = os.wait4(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            break
        now = time.monotonic()
        if (
            times := " ".join(Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[11:15])
        ) != worked:
            worked, since = times, now
        if now > end or now - since > IDLE:
            os.killpg(child, signal.SIGKILL)
            _, _, used = os.wait4(child, 0)
            code = -signal.SIGALRM
            break
        time.sleep(0.005)
    with contextlib.suppress(OSError):
        os.killpg(child, signal.SIGKILL)
    texts = [path.read_text(errors="surrogateescape") if path.exists() else "" for path in said]
    for path in said:
        path.unlink(missing_ok=True)
    return Ended(
        code, used.ru_utime + used.ru_stime, used.ru_maxrss << 10, texts[0], texts[1], texts[2].splitlines()
    )


def bound_by_permissions() -> None:
    """From here on this process, if it is root's, may do only what permissions allow (capabilities(7))."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    if libc.capget(header, sets) == 0:
        for i in range(3):
            sets[i] &= ~0b1111  # CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER
        libc.capset(header, sets)


def diffkd(arguments: Sequence[str]) -> None:
    """The command, in this process."""
    from diffkd.cli import main

    sys.argv = ["diffkd", *arguments]
    sys.path[0] = ""
    main()


def tree(folder: Path) -> dict[str, Any]:
    """Every path below the folder: its kind, its permissions, and its content or target."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        what: Any = None
        if stat.S_ISLNK(mode):
            what = os.readlink(path)
        elif stat.S_ISREG(mode) and path.stat().st_size < 1 << 24:
            what = hash(path.read_bytes())
        found[str(path.relative_to(folder))] = (mode, what)
    return found
