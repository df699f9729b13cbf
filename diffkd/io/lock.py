"""A folder's lock, with a record of its owner."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from diffkd.errors import UserError
from diffkd.io.files import file_lock, write_json
from diffkd.io.system_errors import explained
from diffkd.io.text import from_json, log, read_text

FILES = (".lock", ".owner.json")


class Lock:
    """The lock of a folder, `.lock`, with its owner in `.owner.json` beside it.

    The lock is the operating system's: it ends with the process that holds it, on another host too where the
    file system supports that. The owner's record is for error messages, and to notice a process that ended
    without releasing the lock; it decides only on file systems without locks.
    """

    def __init__(self, folder: Path, name: Path, remedy: str) -> None:
        """name, remedy: how an error message calls the folder, and what it tells the user to do."""
        self.folder, self.name, self.remedy = folder, name, remedy
        self._file, self._owner = (folder / file for file in FILES)
        self._lock: FileLock | None = None

    def take(self) -> None:
        """Raises UserError where another process holds the lock, naming that process, and where the folder
        cannot be locked, as one of another user's."""
        self._lock = file_lock(self._file)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{self.name} is in use by {self._describe(self._read())}; {self.remedy}"
            ) from None
        except NotImplementedError:
            self._lock = None
        except OSError as error:
            raise explained(error, f"{self.name} cannot be locked by {self._file}") or error from error
        previous = self._read()
        if previous is not None:
            if self._lock is None and not _has_ended(previous):
                raise UserError(
                    f"{self.name} is in use by {self._describe(previous)}; {self.remedy}, or if that process "
                    f"has ended, delete {self._owner}"
                )
            log.warning(
                "%s was locked by %s, which has ended: taken over", self.name, self._describe(previous)
            )
        owner = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%F %T")}
        try:
            write_json(self._owner, owner)
        except OSError as error:
            self.release()
            raise explained(error, f"{self.name} cannot be locked by {self._owner}") or error from error

    def release(self) -> None:
        with contextlib.suppress(OSError):  # of a disk that has become read-only; the lock itself is free
            self._owner.unlink(missing_ok=True)
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self._file.unlink(missing_ok=True)
            self._lock.release()

    def _read(self) -> dict[str, Any] | None:
        try:
            if self._owner.is_symlink():
                raise ValueError("a link is never ours, and may lead anywhere")
            owner = from_json(read_text(self._owner))
            return {key: owner[key] for key in ("host", "process", "since")}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError):
            return {"host": "?", "process": "?", "since": "?"}  # half written when the power failed

    @staticmethod
    def _describe(owner: dict[str, Any] | None) -> str:
        if owner is None:
            return "another process"
        return f"process {owner['process']} on {owner['host']} (since {owner['since']})"


def _has_ended(owner: dict[str, Any]) -> bool:
    """Whether the owner is known to have ended; on another host that cannot be known."""
    process = owner["process"]
    here = owner["host"] == socket.gethostname() and isinstance(process, int)
    return here and not (0 < process < 1 << 31 and psutil.pid_exists(process))
