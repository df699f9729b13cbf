"""Files and folders that are written whole or not at all, whenever the process ends."""

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
    """Yields a temporary sibling of `path`, synced and renamed to it at the end, or removed on an error."""
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
    """`new_file` for a folder. An existing one is replaced by two renames; `remove_leftovers` restores it if
    the process ends between them."""
    path = path.resolve()  # a symbolic link stays one
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
    """Raises UserError, before any work is done, where no file can be written at `path`."""
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; give a file's name")
    parent = next((p for p in path.absolute().parents if p.exists()), None)
    if parent is not None and not parent.is_dir():
        raise UserError(f"{option} {path} is inside {parent}, which is a file; use another place")
    if parent is not None and not os.access(parent, os.W_OK):
        raise UserError(f"{option} {path} cannot be written in {parent}; use another place")


def append_json(path: Path, record: Any) -> None:
    """Appends to a JSON list in a file that other processes may append to at the same time."""
    with FileLock(path.with_name(f".{path.name}.lock"), timeout=30):
        write_json(path, [*read_json(path, []), record])


def remove_leftovers(*folders: Path) -> None:
    """Removes what killed processes left half written here, and restores what they half replaced."""
    for folder in folders:
        for left in list(folder.glob(".*")):
            name = LEFTOVER.fullmatch(left.name)
            if name is None:
                continue
            if name[2] == "old" and not (folder / name[1]).exists():
                left.rename(folder / name[1])  # the new folder had not taken its place yet
            elif left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()


def sha256(path: Path) -> str:
    """The digest of a file's content, in hex; the file is read in parts."""
    total = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(1 << 20):
            total.update(part)
    return total.hexdigest()


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed because the disk or the user's quota is full. Libraries that are not written in
    Python give the error number in their message only."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(f"(os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def format_bytes(size: float) -> str:
    """Such as 1.23 MB."""
    power = next((p for p in range(4) if size < 999.5 * 1000**p), 4)
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def free_bytes(path: Path) -> int:
    """Free space, in bytes, of the disk where `path` is or would be."""
    return shutil.disk_usage(next(p for p in [path, *path.absolute().parents] if p.exists())).free


def sync(path: Path) -> None:
    """Flushes a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise  # some file systems cannot sync folders
    finally:
        os.close(descriptor)
