"""Files and folders that are written whole or not at all, whenever the process ends."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from diffkd.errors import UserError
from diffkd.io.system_errors import NO_ROOM, system_error
from diffkd.io.text import from_json, read_text, reason

LEFTOVER = re.compile(r"\.(.+)\.\d+\.(tmp|old)")
UNWRITTEN = b"unwritten"  # what a new temporary file holds


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path`, synced and renamed to it at the end, or removed on an error.

    Its permissions are those of any new file, whatever a library gave it. It is locked while it is written,
    so that siblings which a killed process left are told from those of a living one, and removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = _created(temporary, _new_file)
    except OSError as error:
        _complete(error, path, temporary)
        raise
    try:
        os.write(descriptor, UNWRITTEN)
        mode = os.fstat(descriptor).st_mode
        yield temporary
        with temporary.open("rb") as stream:
            assert stream.read(len(UNWRITTEN) + 1) != UNWRITTEN, f"{temporary} was not written"
        _set_mode(temporary, mode)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except Exception as error:
        _complete(error, path, temporary)
        raise
    finally:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """`new_file` for a folder and all files in it. An existing one is replaced by two renames;
    `remove_leftovers` restores it if the process ends between them."""
    path = Path(os.path.realpath(path))  # a symbolic link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove(temporary)
    descriptor = _created(temporary, _new_folder)
    try:
        mode = _mode_of_new_files(temporary)
        yield temporary
        for inner in temporary.rglob("*"):
            if inner.is_file():
                _set_mode(inner, mode)
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
    except Exception as error:
        _complete(error, path, temporary)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)


def _complete(error: Exception, path: Path, temporary: Path) -> None:
    """Gives an error of writing the system's number, which some libraries tell in their message only, and the
    name of `path`, which a stream does not know."""
    number = system_error(error)
    if isinstance(error, OSError):
        if number is not None and (error.filename is None or temporary.name in str(error.filename)):
            error.errno, error.strerror, error.filename = number, os.strerror(number), str(path)
    elif number is not None and number in NO_ROOM:
        raise OSError(number, os.strerror(number), str(path)) from error


def _new_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)  # never through a link


def _new_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY)


def _created(path: Path, create: Callable[[Path], int]) -> int:
    """A descriptor of a new file or folder that this process alone has locked, where the file system has
    locks."""
    while True:
        try:
            descriptor = create(path)
        except FileNotFoundError:
            if not path.parent.exists():
                raise
            continue  # a folder, taken away as below
        try:
            _lock(descriptor, wait=True)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            _remove(path)
            raise
        os.close(descriptor)  # before it was locked, another process took it for one that was left behind


def _remove_abandoned(path: Path) -> None:
    """Removes temporary siblings of this file or folder which no living process has locked."""
    for name in os.listdir(path.parent):
        left = LEFTOVER.fullmatch(name)
        if left is None or left[1] != path.name or left[2] != "tmp":
            continue
        sibling = path.with_name(name)
        with contextlib.suppress(OSError):  # of another user, or just now renamed
            if sibling.is_symlink():
                sibling.unlink()
                continue
            descriptor = os.open(sibling, os.O_RDONLY if sibling.is_dir() else os.O_RDWR)
            try:
                if _lock(descriptor, wait=False):
                    _remove(sibling)
            finally:
                os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Whether the file is locked now; never where another process has it, or the file system has no locks."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _mode_of_new_files(folder: Path) -> int:
    """The permissions that the umask, or the folder's access list, gives to a new file."""
    probe = folder / ".mode"
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return os.fstat(descriptor).st_mode
    finally:
        os.close(descriptor)
        probe.unlink()


def _set_mode(path: Path, mode: int) -> None:
    """Libraries that write to a temporary file of their own leave one that only its owner can read."""
    if path.stat().st_mode != mode:
        with contextlib.suppress(PermissionError):  # of a file system that has none
            path.chmod(stat.S_IMODE(mode))


def _remove(path: Path) -> None:
    """Removes a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, default: Any) -> Any:
    return from_json(read_text(path)) if path.is_file() else default


def append_json(path: Path, record: Any) -> None:
    """Appends to a JSON list in a file that other processes may append to at the same time.

    Raises UserError where the file holds anything else.
    """
    with file_lock(path.with_name(f".{path.name}.lock"), timeout=30):
        write_json(path, [*read_records(path), record])


def read_records(path: Path) -> list[Any]:
    """The JSON list in a file, [] if there is none. Raises UserError where the file holds anything else."""
    try:
        content = read_json(path, [])
        if not isinstance(content, list):
            raise ValueError("it holds no list")
    except ValueError as error:
        raise UserError(
            f"{path} is not a list of records ({reason(error)}); repair it, or move it away: what it held is "
            "then measured again"
        ) from error
    return content


def file_lock(path: Path, timeout: float = 0) -> FileLock:
    """A lock for a `with` statement or `acquire`. Raises UserError where the file is a link: it would be made
    wherever that leads."""
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link, and locks are not made through links; remove it")
    return FileLock(path, timeout=timeout)


def remove_leftovers(*folders: Path) -> None:
    """Removes what killed processes left half written here, and restores what they half replaced."""
    for folder in folders:
        for left in list(folder.glob(".*")):
            name = LEFTOVER.fullmatch(left.name)
            if name is None:
                continue
            if name[2] == "old" and not (folder / name[1]).exists():
                left.rename(folder / name[1])  # the new folder had not taken its place yet
            else:
                _remove(left)


def sha256(path: Path) -> str:
    """The digest of a file's content, in hex; the file is read in parts."""
    total = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(1 << 20):
            total.update(part)
    return total.hexdigest()


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
