"""Full disks, and other errors on writing, in every command; afterwards the same command must succeed."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attacks.base import Attack, Place
from attacks.names import parameters
from attacks.run import written

COMMANDS = [
    ["train", "train.yaml", "out=disk/new"],
    ["distill", "distill.yaml", "out=disk/new"],
    ["distill", "classifier.yaml", "out=disk/new"],
    ["sample", "plain", "--out", "disk/new", "-n", "6", "--steps", "1"],
    ["sample", "plain", "--out", "disk/new.npz", "-n", "6", "--steps", "1"],
    ["evaluate", "plain", "--reference", "images.npz", "--features", "digits", "--steps", "1,2", "--samples",
     "8",
     "--out", "disk/new.json"],
    ["evaluate", "images.npz", "--reference", "images", "--features", "digits", "--json"],
    ["stats", "images", "--out", "disk/new.npz", "--features", "digits", "--store-features"],
    ["benchmark", "bench.yaml", "out=disk/new"],
    ["compare", "record.json", "record2.json"],
    ["methods"],
    ["train", "train.yaml", "--dry-run"],
    ["fid", "images.npz", "drawn", "--features", "digits"],
]  # fmt: skip
NEEDED = ["train.yaml", "distill.yaml", "classifier.yaml", "bench.yaml", "plain", "images", "images.npz",
          "record.json",
          "record2.json", "drawn"]  # fmt: skip
ERRORS = [errno.ENOSPC] * 6 + [errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES]


def known_commands() -> list[list[str]]:
    """Those of COMMANDS that this diffkd has."""
    known = {command for command, *_ in parameters()} | {"methods"}
    return [command for command in COMMANDS if command[0] in known]


def failing(at: int, number: int, place: Path) -> Callable[[], None]:
    """From the at-th change to the disk below `place` on, every one fails, except that of removing."""

    def begin() -> None:
        count = 0

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            if event in ("os.remove", "os.rmdir"):
                return
            for path in written(event, args):
                if os.path.realpath(path).startswith(f"{place}/"):
                    count += 1
                    if count >= at:
                        raise OSError(number, os.strerror(number), path)

        sys.addaudithook(hook)

    return begin


def mounted(place: Path, size: int) -> bool:
    """Whether a file system of so many KiB could be mounted there, or be given that size."""
    options = ("remount," if os.path.ismount(place) else "") + f"size={size}k"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    return subprocess.run(command, capture_output=True).returncode == 0


def attack(rng: random.Random, number: int, place: Place, scene: Path) -> Attack:
    commands = known_commands()
    arguments = commands[number % len(commands)]
    place.bring(scene, *NEEDED)
    disk = place.here / "disk"
    disk.mkdir()
    silent = arguments[0] == "compare"
    writes = any("disk/" in word for word in arguments)
    how = (
        "stdout"
        if not writes
        else rng.choice(["mount", "mount", "fail", "fail", "stdout", "stderr", "home", "tmp"])
    )
    if how in ("stdout", "stderr"):
        return Attack(arguments, f"{how} is a full disk", may=(0, 1), silent=silent, **{how: "/dev/full"})  # type: ignore[arg-type]
    if how == "mount":
        size = rng.choice([4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384])
        if mounted(disk, size):
            return Attack(
                arguments, f"a disk of {size} KiB", may=(0, 1), again=lambda: _enlarge(disk),
                end=lambda: _unmount(disk),
            )  # fmt: skip
    error, at = rng.choice(ERRORS), int(2 ** rng.uniform(0, 7))
    where = {"home": place.root / "home", "tmp": place.root / "tmp"}.get(how, disk)
    may = (0, 1) if error in (errno.ENOSPC, errno.EDQUOT) else (0, 1, 2)
    what = f"{errno.errorcode[error]} from write {at} in {where.name} on"
    return Attack(arguments, what, may=may, inside=failing(at, error, where.resolve()), again=lambda: None)


def _enlarge(disk: Path) -> None:
    mounted(disk, 1 << 17)


def _unmount(disk: Path) -> None:
    subprocess.run(["umount", "-l", str(disk)], check=True)
