"""Drawn images to disk while more are drawn: what `image_folder.py` and `array_file.py` have in common.

What is there is complete, at whatever moment the process ends, and the same drawing goes on from it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import re
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffkd.errors import UserError
from diffkd.generation.encoding import start_worker
from diffkd.io.files import read_json, write_json
from diffkd.io.lock import Lock
from diffkd.io.text import differences

RECORD = "diffkd.json"  # how images were drawn, beside them
LEFTOVER = re.compile(r"\..+\.tmp")  # half written, in the folder of pieces


# Written together: what is lost with a killed process is less than this, and drawn again.
BATCH_IMAGES, BATCH_BYTES, BATCH_SECONDS = 512, 1 << 20, 2.0


@dataclass(frozen=True)
class ResumePlan:
    """there: (n,) bool, which images are. clear: whether what is there has to go first. complete: whether all
    is done."""

    there: bytes
    clear: bool = False
    complete: bool = False

    @staticmethod
    def anew(n: int) -> ResumePlan:
        return ResumePlan(bytes(n), clear=True)

    @staticmethod
    def going_on(indices: np.ndarray, n: int, complete: bool = False) -> ResumePlan:
        there = np.zeros(n, bool)
        there[indices] = True
        return ResumePlan(there.tobytes(), complete=complete and bool(there.all()))

    @property
    def missing(self) -> np.ndarray:
        return ~np.frombuffer(self.there, bool)


class ImageWriter(ABC):
    """Where drawn images go: `plan` says what is there, `start` takes the place, `write` adds, `finish` ends.

    folder: of the complete pieces, and of RECORD: {"drawn": settings, "images": n, "complete": whether all n
    are there}.
    """

    format: str

    def __init__(self, out: Path, folder: Path, workers: int) -> None:
        self.out, self.folder, self.workers = out, folder, workers
        self._pool: Executor | None = None
        self._waiting: deque[Future[None]] = deque()
        self._held: list[tuple[np.ndarray, np.ndarray]] = []
        self._count = 0  # of the images in it
        self._since = time.monotonic()
        self._lock: Lock | None = None

    @abstractmethod
    def check(self) -> None:
        """Raises UserError where `out` cannot be written, or holds what is not ours to replace."""

    @abstractmethod
    def indices(self) -> np.ndarray:
        """Of the complete images, in any order."""

    @abstractmethod
    def plan(self, settings: Mapping[str, Any], n: int, overwrite: bool) -> ResumePlan:
        """What is to be done for n images of these settings. Raises UserError where others are there, unless
        they may be overwritten."""

    @property
    def grid(self) -> Path:
        """Beside the images and not among them: a folder of images is what any tool of FID may read."""
        out = self.out.resolve()
        return out.with_suffix(".grid.png") if out.suffix == ".npz" else out.with_name(f"{out.name}-grid.png")

    def _refusal(self, why: str) -> UserError:
        return UserError(f"{self.out} {why}; use another --out, or --overwrite")

    def start(self, settings: Mapping[str, Any], n: int, overwrite: bool, plan: ResumePlan) -> None:
        """Takes the place for what was planned. Raises UserError where another process has it, or had."""
        self._take()
        if self.plan(settings, n, overwrite) != plan:
            raise UserError(f"{self.out} was written by another process in between; start again")
        if plan.clear:
            for path in self.folder.iterdir():
                if self._is_ours(path.name):
                    path.unlink()
        self._say(settings, n, complete=False)

    def _take(self) -> None:
        """Holds the lock; what a process that was killed left half written goes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(self.folder, self.out, "wait for it")
        lock.take()
        self._lock = lock
        ours = "|".join(re.escape(path.name) for path in (self.out, self.grid))
        beside = re.compile(rf"\.({ours})\.\d+\.tmp")
        for path in [*self.folder.iterdir(), *self.out.resolve().parent.iterdir()]:
            within = path.parent == self.folder and LEFTOVER.fullmatch(path.name)
            if within or beside.fullmatch(path.name):
                path.unlink()

    def tidy(self) -> None:
        """What a process that was killed at the very end left beside images that are all there."""
        try:
            self._take()
        except UserError:  # another process replaces them
            return
        self._remove_pieces()
        self.close()

    @abstractmethod
    def _remove_pieces(self) -> None:
        """What is no longer needed once all images are there."""

    def _say(self, settings: Mapping[str, Any], n: int, *, complete: bool) -> None:
        write_json(self.folder / RECORD, {"drawn": dict(settings), "images": n, "complete": complete})

    @abstractmethod
    def _is_ours(self, name: str) -> bool:
        """Whether a file of `folder` holds images."""

    def write(self, indices: np.ndarray, images: np.ndarray) -> None:
        """Images (B, H, W, C) uint8 of these indices, ascending; returns before they are written.

        It waits while much is unwritten. The arrays may be used again at once. Raises OSError of an earlier
        write.
        """
        self._held.append((indices, images.copy()))
        self._count += len(indices)
        many = self._count >= BATCH_IMAGES or self._count * images[:1].nbytes >= BATCH_BYTES
        if many or time.monotonic() - self._since > BATCH_SECONDS:
            self._pass_on()

    def warm(self) -> None:
        """Starts the workers, which takes a while, before there is anything for them."""
        if self._pool is None:
            self._pool = self._make_pool()
            self._waiting.extend(self._pool.submit(_nothing) for _ in range(self.workers))

    def _pass_on(self) -> None:
        """What is held, to the workers."""
        self._since = time.monotonic()
        while len(self._waiting) > 2 * self.workers or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()
        if self._held:
            self.warm()
            assert self._pool is not None
            indices, images = (np.concatenate(parts) for parts in zip(*self._held, strict=True))
            self._held, self._count = [], 0
            self._submit(self._pool, indices, images)

    def _make_pool(self) -> Executor:
        """Processes, or one thread, whose work is mostly waiting for the disk."""
        if not self.workers:
            return ThreadPoolExecutor(1, "diffkd-write")
        spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads and CUDA is none
        return ProcessPoolExecutor(self.workers, mp_context=spawn, initializer=start_worker)

    @abstractmethod
    def _submit(self, pool: Executor, indices: np.ndarray, images: np.ndarray) -> None: ...

    def flush(self) -> None:
        """Waits until all is written. Raises OSError of a write."""
        self._pass_on()
        while self._waiting:
            self._waiting.popleft().result()

    @abstractmethod
    def first(self, count: int) -> np.ndarray:
        """Images 0 to count - 1, (count, H, W, C), which are there."""

    @abstractmethod
    def finish(self, settings: Mapping[str, Any], n: int, labels: np.ndarray | None) -> None:
        """Called when all n are there, and everything else is done."""

    def close(self) -> None:
        """Lets go of the place and of the workers, who end what they have begun."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._lock is not None:
            self._lock.release()
            self._lock = None
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # where nothing came of it


def _nothing() -> None:
    """What a worker does first."""


def describe_difference(record: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """How images of a record differ from those of these settings."""
    differ = differences(record["drawn"], json.loads(json.dumps(settings)))
    return f"holds images drawn otherwise ({'; '.join(differ[:3])})" if differ else None


def record_at(path: Path) -> dict[str, Any] | None:
    try:
        return checked(read_json(path, None))
    except (OSError, ValueError):
        return None


def checked(content: Any) -> dict[str, Any] | None:
    """A record of drawn images; a pipeline's own card has the same name, and is none."""
    known = isinstance(content, dict) and {"drawn", "images", "complete"} <= content.keys()
    return content if known else None
