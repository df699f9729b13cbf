"""Odd surroundings of a right command: environment, folders, limits, permissions, signals, company."""

from __future__ import annotations

import itertools
import os
import random
import resource
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from attacks.base import Attack, Place, short
from attacks.disks import NEEDED, known_commands
from attacks.run import bound_by_permissions, company, diffkd, stream, written

ENVIRONMENTS: list[dict[str, str | None]] = [  # None: without it
    {"DIFFKD_CACHE": "/dev/null"}, {"DIFFKD_CACHE": "images.npz"}, {"DIFFKD_CACHE": "e" * 300},
    {"DIFFKD_CACHE": "~nosuchuser/x"}, {"DIFFKD_CACHE": "."}, {"DIFFKD_CACHE": "off"},
    {"DIFFKD_CACHE": "\udcff"}, {"ACCELERATE_TORCH_DEVICE": "x"},
    {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, {"HOME": None},
    {"HOME": "/nonexistent", "XDG_CACHE_HOME": None}, {"HOME": "/etc/passwd", "XDG_CACHE_HOME": None},
    {"HOME": "", "XDG_CACHE_HOME": ""}, {"TMPDIR": None}, {"TMPDIR": "/nonexistent"}, {"TMPDIR": "here"},
    {"XDG_CACHE_HOME": "/etc/passwd"}, {"XDG_CACHE_HOME": "x"}, {"LANG": "C", "LC_ALL": "C"},
    {"LC_ALL": "xx_XX.UTF-8"}, {"TZ": "Asia/Kathmandu"}, {"TZ": "nowhere"}, {"TERM": "dumb"}, {"TERM": None},
    {"COLUMNS": "1", "LINES": "1"}, {"COLUMNS": "x", "LINES": "-1"}, {"COLUMNS": "0"},
    {"COLUMNS": "100000000"}, {"FORCE_COLOR": "1"}, {"NO_COLOR": "1"},
    {"TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1"}, {"RANK": "x"}, {"RANK": "0", "WORLD_SIZE": "2"},
    {"WORLD_SIZE": "x"}, {"LOCAL_RANK": "5"}, {"ACCELERATE_MIXED_PRECISION": "x"},
    {"ACCELERATE_USE_CPU": "x"}, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
    {"ACCELERATE_DYNAMO_BACKEND": "x"}, {"ACCELERATE_USE_DEEPSPEED": "true"},
    {"ACCELERATE_USE_FSDP": "true"}, {"ACCELERATE_DEBUG_MODE": "1"}, {"MPLBACKEND": "x"}, {"HF_TOKEN": "\n"},
    {"HTTPS_PROXY": "x"}, {"PATH": None}, {"PATH": "/nonexistent"}, {"GIT_DIR": "/nonexistent"},
    {"USER": "\x1b[31m", "LOGNAME": "\xe9"}, {"DIFFKD_TRACEBACK": ""}, {"HF_HUB_OFFLINE": "x"},
    {"JUPYTER_COLUMNS": "x"},
]  # fmt: skip
LIMITS = {  # of a process, and their values
    "files": (resource.RLIMIT_NOFILE, [3, 6, 10, 16, 32]), "stack": (resource.RLIMIT_STACK, [1 << 17]),
    "file size": (resource.RLIMIT_FSIZE, [200, 5000, 40_000]), "processes": (resource.RLIMIT_NPROC, [1]),
    "memory": (resource.RLIMIT_AS, [1 << 20, 20 << 20, 100 << 20, 300 << 20]),
}  # fmt: skip

# each of these changes an attack that would be right -------------------------------------------------------


def _environment(rng: random.Random, attack: Attack, place: Place) -> None:
    attack.environment = rng.choice(ENVIRONMENTS)
    attack.what = short(attack.environment)
    attack.may, attack.named = (0, 1, 2), ("/etc/passwd", "/nonexistent")


def _limit(rng: random.Random, attack: Attack, place: Place) -> None:
    name = rng.choice(list(LIMITS))
    which, values = LIMITS[name]
    value = rng.choice(values)

    def begin() -> None:
        most = value
        if which == resource.RLIMIT_AS:
            most += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(which, (most, resource.getrlimit(which)[1]))

    attack.what, attack.inside, attack.may = f"a limit of {name}: {value}", begin, (0, 1, 2)


def _umask(rng: random.Random, attack: Attack, place: Place) -> None:
    mask = rng.choice([0o077, 0o777, 0o000, 0o222, 0o300])
    attack.what, attack.inside, attack.may = f"umask {mask:o}", partial(os.umask, mask), (*attack.may, 2)


def _gone(rng: random.Random, attack: Attack, place: Place) -> None:
    gone = place.here / "gone"
    gone.mkdir()

    def begin() -> None:
        os.chdir(gone)
        gone.rmdir()

    attack.what, attack.inside, attack.may = "the current folder is removed", begin, (0, 1, 2)


def _signal(rng: random.Random, attack: Attack, place: Place) -> None:
    """Sent as the at-th change to the disk is made. Afterwards the same command must succeed."""
    sent, at = rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP]), int(2 ** rng.uniform(0, 6.5))
    inside = f"{place.here.resolve()}/"

    def begin() -> None:
        count = 0

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            if any(os.path.realpath(path).startswith(inside) for path in written(event, args)):
                count += 1
                if count == at:
                    os.kill(os.getpid(), sent)

        sys.addaudithook(hook)

    attack.what, attack.inside, attack.may = f"{sent.name} at write {at}", begin, (0, 1, 130)
    attack.again = lambda: None


def _clock(rng: random.Random, attack: Attack, place: Place) -> None:
    """The wall clock jumps forth and back; the monotonic one does not."""
    jump = rng.choice([3600.0, 1e9, 1.5e9])

    def begin() -> None:
        real, signs = time.time, itertools.cycle([jump, -jump])
        time.time = lambda: real() + next(signs)

    attack.what, attack.inside = f"a clock that jumps by {jump:g} s", begin


def _closed(rng: random.Random, attack: Attack, place: Place) -> None:
    numbers = rng.choice([(0,), (1,), (2,), (1, 2), (0, 1, 2)])

    def begin() -> None:
        for number in numbers:
            os.close(number)
        for number, name in ((1, "stdout"), (2, "stderr")):
            if number in numbers:
                setattr(sys, name, None)

    attack.what, attack.inside, attack.may = f"closed: {numbers}", begin, (0, 1)
    attack.stderr = str(place.root / "stderr") if 2 in numbers else None


def _reader_gone(rng: random.Random, attack: Attack, place: Place) -> None:
    def begin() -> None:
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 1)
        sys.stdout = stream(1, "utf-8", "strict")

    attack.what, attack.inside = "stdout is a pipe that nobody reads", begin


def _encoding(rng: random.Random, attack: Attack, place: Place) -> None:
    attack.encoding = rng.choice(["ascii", "latin-1"])
    attack.what = f"streams in {attack.encoding}"


def _user(rng: random.Random, attack: Attack, place: Place) -> None:
    attack.what, attack.may = f"another user's folder: {owned(rng, place)}", (0, 1, 2)
    attack.inside = bound_by_permissions


def _company(rng: random.Random, attack: Attack, place: Place) -> None:
    def begin() -> None:
        child = os.fork()
        if child:
            company.append(child)
        else:
            null = os.open("/dev/null", os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            try:
                diffkd(attack.arguments)
            finally:
                os._exit(0)

    attack.what, attack.inside, attack.may = "the same command at the same time", begin, (0, 1, 2)


CHANGES = [
    *[_environment] * 6, _limit, _umask, _gone, _signal, _signal, _clock, _closed, _reader_gone, _encoding,
    _user,
    _company,
]  # fmt: skip


def owned(rng: random.Random, place: Place) -> str:
    """Gives the working folder, or parts of it, to another user, with some permissions for the rest."""
    folders, files = rng.choice(
        [(0o755, 0o644), (0o777, 0o644), (0o777, 0o666), (0o777, 0o600), (0o711, 0o644), (0o555, 0o444)]
    )
    found = [place.here, *place.here.rglob("*")]
    if rng.random() < 0.4:
        found = [place.here, *rng.sample(found[1:], min(len(found) - 1, 3))]
    for path in found:
        if not path.is_symlink():
            path.chmod(folders if path.is_dir() else files)
            if os.getuid() == 0:
                os.chown(path, 65534, 65534)
    return f"folders {folders:o}, files {files:o}, {len(found)} of them"


def attack(rng: random.Random, number: int, place: Place, scene: Path) -> Attack:
    commands = known_commands()
    arguments = [word.replace("disk/", "") for word in commands[number % len(commands)]]
    place.bring(scene, *NEEDED)
    silent = arguments[0] == "compare"
    made = Attack(arguments, "", may=(0, 1) if silent else (0,), silent=silent)
    rng.choice(CHANGES)(rng, made, place)
    return made
