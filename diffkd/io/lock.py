"""One owner at a time: a lock that says who holds it."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from diffkd.errors import UserError
from diffkd.io.text import from_json, log

FILES = (".lock", ".owner.json")


class Lock:
    """The lock of a folder, `.lock`, with who holds it beside it, `.owner.json`.

    The lock is the operating system's: it ends with its process, however that ends, also of another host
    where the file system knows of it. What the owner said of itself is for people, and to see that one
    ended without letting go; only where a file system has no locks does it decide.
    """

    def __init__(self, folder: Path, name: Path, remedy: str) -> None:
        """name, remedy: what an error calls the place, and says to do about it."""
        self.folder, self.name, self.remedy = folder, name, remedy
        lock, self._owner = (folder / file for file in FILES)
        self._lock: FileLock | None = FileLock(lock)

    def take(self) -> None:
        """Raises UserError where another process holds it, naming that."""
        assert self._lock is not None
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{self.name} is in use by {self._named(self._read())}; {self.remedy}") from None
        except NotImplementedError:
            self._lock = None
        before = self._read()
        if before is not None:
            if self._lock is None and not _is_gone(before):
                raise UserError(
                    f"{self.name} is in use by {self._named(before)}; {self.remedy}, or where it is gone, "
                    f"delete {self._owner}"
                )
            log.warning("%s was held by %s, which is gone: taken over", self.name, self._named(before))
        owner = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%F %T")}
        try:
            self._owner.write_text(json.dumps(owner), encoding="utf-8")
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        self._owner.unlink(missing_ok=True)
        if self._lock is not None:
            (self.folder / FILES[0]).unlink(missing_ok=True)
            self._lock.release()

    def _read(self) -> dict[str, Any] | None:
        try:
            found = from_json(self._owner.read_text(encoding="utf-8"))
            return {key: found[key] for key in ("host", "process", "since")}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError):
            return {"host": "?", "process": "?", "since": "?"}  # torn by a power cut

    @staticmethod
    def _named(owner: dict[str, Any] | None) -> str:
        if owner is None:
            return "another process"
        return f"process {owner['process']} on {owner['host']} (since {owner['since']})"


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether a process of this very host is no more; of another host, nobody can say."""
    here = owner["host"] == socket.gethostname() and isinstance(owner["process"], int)
    return here and not psutil.pid_exists(owner["process"])
