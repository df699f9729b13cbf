"""What a place on the disk can take, asked before anything is computed or written."""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
from pathlib import Path

from diffkd.errors import UserError
from diffkd.io.system_errors import explained
from diffkd.io.text import quoted

# Bytes of a name for what makes it that of its temporary sibling; of a path for the names below it.
RESERVED, INNER, MAX_PATH = 32, 200, 4096


def expanded(path: str | Path) -> Path:
    """The path with ~ and ~user replaced where there is such a home; else as it is, as a shell leaves it."""
    return Path(os.path.expanduser(path))


def check_writable(path: Path, option: str, *, folder: bool = False) -> None:
    """Raises UserError, before any work is done, where nothing can be written at `path`.

    option: what named the path, for the message. folder: whether it is to be a folder, new or existing,
    rather than a file. The proof is a temporary file in the nearest folder that exists.
    """
    named = f"{option} {path}"
    if "\0" in str(path) or not is_text(str(path)):
        raise UserError(f"{option} {quoted(str(path))} is not a name in plain UTF-8; use another")
    place = path.absolute()
    try:
        parts = (place, *place.parents)
        if links := [p for p in parts if p.is_symlink() and not p.exists()]:
            raise UserError(f"{named}: {links[0]} is a symbolic link that leads nowhere; use another place")
        if place.exists() and place.is_dir() != folder:
            given, wanted = ("a file", "a folder") if folder else ("a folder", "a file's name")
            raise UserError(f"{named} is {given}; give {wanted}")
        parent = next(p for p in parts if p.exists() and (folder or p != place))
        if not parent.is_dir():
            raise UserError(f"{named} is inside {parent}, which is a file; use another place")
        _check_lengths(place, parent)
        named = f"{named} cannot be written in {parent}"
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise explained(error, named) or error from error


def is_text(name: str) -> bool:
    """Whether a name can be written to a file of text: it holds no bytes that were not UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_lengths(place: Path, parent: Path) -> None:
    """Raises OSError where names below `parent`, which exists, are too long, or would be with RESERVED."""
    longest = os.pathconf(parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    new = [len(os.fsencode(part)) for part in place.relative_to(parent).parts]
    if max(new, default=0) + RESERVED > longest or len(os.fsencode(place)) + INNER > MAX_PATH:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


def free_bytes(path: Path) -> int:
    """Free space, in bytes, of the disk where `path` is or would be."""
    return shutil.disk_usage(next(p for p in [path, *path.absolute().parents] if p.exists())).free


def free_files(path: Path) -> float:
    """How many more files fit on the disk where `path` is or would be; infinite where there is no limit."""
    if not hasattr(os, "statvfs"):
        return math.inf
    disk = os.statvfs(next(p for p in [path, *path.absolute().parents] if p.exists()))
    return disk.f_favail if disk.f_files else math.inf
