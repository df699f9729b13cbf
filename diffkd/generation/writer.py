"""Writing images to disk while more are generated: what `folder_writer.py` and `npz_writer.py` share.

Whenever the process ends, the images on disk are complete, and the same command resumes from them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from diffkd.errors import UserError
from diffkd.generation.encoding import start_worker, without_interrupts
from diffkd.generation.resume import RECORD, ResumePlan
from diffkd.io.files import write_json
from diffkd.io.lock import Lock

LEFTOVER = re.compile(r"\..+\.tmp")  # half written

# Images are handed to the workers in batches of this size; a killed process loses less than one batch.
BATCH_IMAGES, BATCH_BYTES, BATCH_SECONDS = 512, 1 << 20, 2.0


class ImageWriter(ABC):
    """Writes images to `out`: `plan` finds what exists, `start` locks, `write` adds images, `finish` ends.

    folder: holds the complete parts, and RECORD. workers: processes that encode; 0 for a thread.
    """

    format: str
    prompts: Sequence[str] | None = None  # image i is of the one at i, modulo their number

    def __init__(self, out: Path, folder: Path, workers: int) -> None:
        self.out, self.folder, self.workers = out, folder, workers
        self._pool: Executor | None = None
        self._waiting: deque[Future[None]] = deque()
        self._buffer: list[tuple[np.ndarray, np.ndarray]] = []
        self._buffered = 0  # images
        self._since = time.monotonic()
        self._lock: Lock | None = None

    @abstractmethod
    def check(self) -> None:
        """Raises UserError where `out` cannot be written, or holds files that must not be replaced."""

    @abstractmethod
    def indices(self) -> np.ndarray:
        """The indices of the complete images, in any order."""

    @abstractmethod
    def plan(self, settings: Mapping[str, Any], n: int, overwrite: bool) -> ResumePlan:
        """What is left to do for n images of these settings. Raises UserError where other images exist,
        unless they may be overwritten."""

    @property
    def grid(self) -> Path:
        """The path of the grid: beside the images, not among them, as other tools may read the folder."""
        out = Path(os.path.realpath(self.out))
        return out.with_suffix(".grid.png") if out.suffix == ".npz" else out.with_name(f"{out.name}-grid.png")

    def _refusal(self, why: str) -> UserError:
        return UserError(f"{self.out} {why}; use another --out, or --overwrite")

    def start(self, settings: Mapping[str, Any], n: int, overwrite: bool, plan: ResumePlan) -> None:
        """Locks `out` to carry out the plan. Raises UserError where another process uses it, or has since."""
        self._take_lock()
        if self.plan(settings, n, overwrite) != plan:
            raise UserError(f"{self.out} was changed by another process meanwhile; run the command again")
        if plan.clear:
            for path in self.folder.iterdir():
                if self._holds_images(path.name):
                    path.unlink()
        self._write_record(settings, n, complete=False)

    def _take_lock(self) -> None:
        """Locks the folder, and deletes what a killed process left half written."""
        if self.folder != self.out and self.folder.is_symlink():  # --out itself may be one, of the user's
            raise UserError(
                f"{self.folder} is a symbolic link, and parts are not written through one; remove it"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(self.folder, self.out, "wait for it")
        lock.take()
        self._lock = lock
        names = "|".join(re.escape(path.name) for path in (self.out, self.grid))
        beside = re.compile(rf"\.({names})\.\d+\.tmp")
        for path in [*self.folder.iterdir(), *self.grid.parent.iterdir()]:
            within = path.parent == self.folder and LEFTOVER.fullmatch(path.name)
            if within or beside.fullmatch(path.name):
                path.unlink()

    def tidy(self) -> None:
        """Deletes what a process killed at the very end left beside a complete set of images."""
        try:
            self._take_lock()
        except UserError:  # another process is replacing them
            return
        self._remove_parts()
        self.close()

    @abstractmethod
    def _remove_parts(self) -> None:
        """Deletes what is no longer needed once all images exist."""

    def _write_record(self, settings: Mapping[str, Any], n: int, *, complete: bool) -> None:
        write_json(self.folder / RECORD, {"drawn": dict(settings), "images": n, "complete": complete})

    @abstractmethod
    def _holds_images(self, name: str) -> bool:
        """Whether the file of this name in `folder` holds images."""

    def write(self, indices: np.ndarray, images: np.ndarray) -> None:
        """Takes images (B, H, W, C) uint8 of these indices, ascending; returns before they are written.

        Waits while too many are unwritten. The arrays may be reused at once. Raises OSError of an earlier
        write.
        """
        self._buffer.append((indices, images.copy()))
        self._buffered += len(indices)
        full = self._buffered >= BATCH_IMAGES or self._buffered * images[:1].nbytes >= BATCH_BYTES
        if full or time.monotonic() - self._since > BATCH_SECONDS:
            self._submit_buffer()

    def warm(self) -> None:
        """Starts the workers ahead of the first images, as that takes a while."""
        if self._pool is None:
            self._pool = self._make_pool()
            if self.workers:
                with without_interrupts():
                    self._waiting.extend(self._pool.submit(_no_work) for _ in range(self.workers))

    def _submit_buffer(self) -> None:
        """Hands the buffered images to the workers."""
        self._since = time.monotonic()
        while len(self._waiting) > 2 * self.workers or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()
        if self._buffer:
            self.warm()
            assert self._pool is not None
            indices, images = (np.concatenate(parts) for parts in zip(*self._buffer, strict=True))
            self._buffer, self._buffered = [], 0
            self._submit(self._pool, indices, images)

    def _make_pool(self) -> Executor:
        """Processes, or a single thread, which mostly waits for the disk."""
        if not self.workers:
            return ThreadPoolExecutor(1, "diffkd-write")
        spawn = multiprocessing.get_context("spawn")  # a process with threads and CUDA cannot be forked
        return ProcessPoolExecutor(self.workers, mp_context=spawn, initializer=start_worker)

    @abstractmethod
    def _submit(self, pool: Executor, indices: np.ndarray, images: np.ndarray) -> None: ...

    def flush(self) -> None:
        """Waits until everything is written. Raises OSError of a write."""
        self._submit_buffer()
        while self._waiting:
            self._waiting.popleft().result()

    @abstractmethod
    def first(self, count: int) -> np.ndarray:
        """Images 0 to count - 1, (count, H, W, C), read back; they must exist."""

    @abstractmethod
    def finish(self, settings: Mapping[str, Any], n: int, labels: np.ndarray | None) -> None:
        """Completes the output once all n images are written. labels: (n,)."""

    def close(self) -> None:
        """Releases the lock and the workers, which finish what they have begun."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._lock is not None:
            self._lock.release()
            self._lock = None
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # if it is empty


def _no_work() -> None:
    """Starts a worker."""
