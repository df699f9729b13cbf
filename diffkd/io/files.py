"""Files that are written whole or not at all, at whatever moment the process ends."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from diffkd.errors import UserError
from diffkd.io.text import from_json

LEFTOVER = re.compile(r"\.(.+)\.\d+\.(tmp|old)")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to, synced and renamed to `path` at the end, removed on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """The same for a folder; one that was there is replaced, in two renames: `remove_left` puts it back where
    the process ended in between."""
    path = path.resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for inner in temporary.rglob("*"):
            sync(inner)
        sync(temporary)
        if path.exists():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.rename(path, old)
            os.rename(temporary, path)
            shutil.rmtree(old)
        else:
            os.rename(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, default: Any) -> Any:
    return from_json(path.read_text(encoding="utf-8")) if path.is_file() else default


def check_writable(path: Path, option: str) -> None:
    """Raises UserError where no file can be written at `path`, before any work is done for it."""
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; give a file's name")
    parent = next((p for p in path.absolute().parents if p.exists()), None)
    if parent is not None and not parent.is_dir():
        raise UserError(f"{option} {path} is inside {parent}, which is a file; use another place")
    if parent is not None and not os.access(parent, os.W_OK):
        raise UserError(f"{option} {path} cannot be written in {parent}; use another place")


def append_json(path: Path, record: Any) -> None:
    """Adds to a list in a file that other processes may be adding to."""
    with FileLock(path.with_name(f".{path.name}.lock"), timeout=30):
        write_json(path, [*read_json(path, []), record])


def remove_leftovers(*folders: Path) -> None:
    """What a process that was killed left half written, or half replaced, in these folders."""
    for folder in folders:
        for left in list(folder.glob(".*")):
            name = LEFTOVER.fullmatch(left.name)
            if name is None:
                continue
            if name[2] == "old" and not (folder / name[1]).exists():
                left.rename(folder / name[1])  # the new one was not in its place yet
            elif left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()


def sha256(path: Path) -> str:
    """Of the file's content, read bit by bit."""
    total = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(1 << 20):
            total.update(part)
    return total.hexdigest()


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed because the disk, or the user's share of it, is full. Libraries that are not
    written in Python say it in words."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(f"(os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def format_bytes(size: float) -> str:
    """Bytes, as people read them."""
    power = next((p for p in range(4) if size < 999.5 * 1000**p), 4)
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def free_bytes(path: Path) -> int:
    """Bytes that can still be written where `path` is, or would be."""
    return shutil.disk_usage(next(p for p in [path, *path.absolute().parents] if p.exists())).free


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise  # some file systems cannot sync a folder
    finally:
        os.close(descriptor)
