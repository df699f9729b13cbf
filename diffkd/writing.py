"""Drawn images to disk while more are drawn: a folder of image files, or one .npz that grows in parts.

What is there is complete, at whatever moment the process ends, and the same drawing goes on from it.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import time
import zipfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from diffkd.base import UserError
from diffkd.encoding import FORMATS, file_name, read_image, start_worker, write_images
from diffkd.runs import differences, new_file, read_json, write_json

RECORD = "diffkd.json"  # how images were drawn, beside them
OURS = re.compile(rf"(\d{{6,}})\.({'|'.join(FORMATS)})")
# Written together: what is lost with a killed process is less than this, and drawn again.
TOGETHER, TOGETHER_BYTES, TOGETHER_SECONDS = 512, 1 << 20, 2.0


class Output(ABC):
    """Where drawn images go: `plan` says what is there, `start` takes the place, `write` adds, `finish` ends.

    folder: of the complete pieces, and of RECORD, which says by what settings they were drawn.
    """

    format: str

    def __init__(self, out: Path, folder: Path, workers: int) -> None:
        self.out, self.folder, self.workers = out, folder, workers
        self._pool: Executor | None = None
        self._waiting: deque[Future[None]] = deque()
        self._held: list[tuple[np.ndarray, np.ndarray]] = []
        self._since = time.monotonic()
        self._lock: FileLock | None = None

    @abstractmethod
    def check(self) -> None:
        """Raises UserError where `out` cannot be written, or holds what is not ours to replace."""

    @abstractmethod
    def record(self) -> dict[str, Any] | None:
        """{"drawn": settings, "images": n, "complete": whether all n are there}, None where none says so."""

    @abstractmethod
    def indices(self) -> np.ndarray:
        """Of the complete images, in any order."""

    def plan(self, settings: Mapping[str, Any], n: int, overwrite: bool) -> np.ndarray | None:
        """(n,) bool: which images are there; None where `start` has to clear the place first.

        Raises UserError where the images there are others, unless overwrite.
        """
        record, there = self.record(), np.zeros(n, bool)
        found = self.indices()
        if record is None:
            others = "holds images, and nothing says how they were drawn" if len(found) else ""
        else:
            differ = differences(record["drawn"], json.loads(json.dumps(settings)))
            others = f"holds images drawn otherwise ({'; '.join(differ[:3])})" if differ else ""
            if not differ and (found >= n).any():
                others = f"holds {len(found)} images drawn so, and {n} are asked for"
        if others and not overwrite:
            raise UserError(f"{self.out} {others}; use another --out, or --overwrite")
        if others or (overwrite and record and record["complete"]):
            return None
        there[found] = True
        return there

    def is_finished(self, n: int) -> bool:
        record = self.record()
        return record is not None and bool(record["complete"]) and record["images"] == n

    def start(self, settings: Mapping[str, Any], n: int, clear: bool) -> None:
        """Takes the place. Raises UserError where another process has it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / ".lock")
            self._lock.acquire(timeout=0)
            for path in [*self.folder.iterdir(), *self.out.parent.glob(f".{self.out.name}.*.tmp")]:
                left = path.name.startswith(".") and path.suffix == ".tmp"  # by a process that was killed
                if left or (clear and self._is_ours(path.name)):
                    path.unlink()
            self._say(settings, n, complete=False)
        except Timeout:
            self._lock = None
            raise UserError(f"{self.out} is being written by another process; wait for it") from None

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
        count = sum(len(indices) for indices, _ in self._held)
        many = count >= TOGETHER or count * images[:1].nbytes >= TOGETHER_BYTES
        if many or time.monotonic() - self._since > TOGETHER_SECONDS:
            self._pass_on()

    def _pass_on(self) -> None:
        """What is held, to the workers."""
        self._since = time.monotonic()
        while len(self._waiting) > 2 * self.workers or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()
        if self._held:
            if self._pool is None:
                self._pool = self._make_pool()
            indices, images = (np.concatenate(parts) for parts in zip(*self._held, strict=True))
            self._held = []
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
    def finish(self, settings: Mapping[str, Any], n: int, labels: np.ndarray | None) -> np.ndarray:
        """Called when all n are there. Returns the first 64, (64, H, W, C)."""

    def close(self) -> None:
        """Lets go of the place and of the workers, who end what they have begun."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._lock is not None:
            (self.folder / ".lock").unlink(missing_ok=True)
            self._lock.release()


class ImageFolder(Output):
    """<index>.png or .webp in a folder, encoded by `workers` processes."""

    def __init__(self, out: Path, suffix: str, workers: int) -> None:
        super().__init__(out, out, workers)
        self.format = suffix

    def check(self) -> None:
        if self.out.is_file():
            raise UserError(f"--out {self.out} is a file; give a folder, or a name in .npz")
        there = {p.name for p in self.out.iterdir()} if self.out.is_dir() else set()
        ours = {name for name in there if self._is_ours(name) or name == ".lock" or name.endswith(".tmp")}
        if self.record() is not None:
            ours.add(RECORD)
        foreign = sorted(there - ours)
        if foreign or (self.out.exists() and self.out.resolve() == Path.cwd()):
            raise UserError(
                f"--out {self.out} holds more than images ({', '.join(foreign[:2])}); use another --out"
            )

    def record(self) -> dict[str, Any] | None:
        return _record(self.folder / RECORD)

    def indices(self) -> np.ndarray:
        names = [p.name for p in self.folder.iterdir()] if self.folder.is_dir() else []
        return np.array([int(match[1]) for match in map(OURS.fullmatch, names) if match], dtype=np.int64)

    def _is_ours(self, name: str) -> bool:
        return OURS.fullmatch(name) is not None

    def _submit(self, pool: Executor, indices: np.ndarray, images: np.ndarray) -> None:
        task = pool.submit(write_images, self.folder, indices.tolist(), images, self.format)
        self._waiting.append(task)

    def finish(self, settings: Mapping[str, Any], n: int, labels: np.ndarray | None) -> np.ndarray:
        self._say(settings, n, complete=True)
        return np.stack([read_image(self.folder / file_name(i, self.format)) for i in range(min(n, 64))])


class ArrayFile(Output):
    """One .npz: arr_0, uint8 NHWC, and arr_1, the labels, as ADM has them.

    Until all images are there its parts lie in a folder beside it; they are never in memory together.
    """

    PART = re.compile(r"(\d+)-(\d+)\.npy")  # images from the first number on, up to the second

    def __init__(self, out: Path) -> None:
        super().__init__(out, out.with_name(f".{out.name}.parts"), workers=0)
        self.format = "npz"

    def check(self) -> None:
        if self.out.is_dir():
            raise UserError(f"--out {self.out} is a folder; give a file's name in .npz, or another folder")

    def record(self) -> dict[str, Any] | None:
        """Of the file, or where there is none of its parts."""
        if not self.out.exists():
            return _record(self.folder / RECORD)
        try:
            with np.load(self.out) as arrays:
                return _checked(json.loads(str(arrays["drawn"])))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None

    def indices(self) -> np.ndarray:
        if self.out.exists():
            record = self.record()
            return np.arange(record["images"] if record else 1)  # of other images it is enough that there are
        return np.concatenate([np.arange(start, stop) for start, stop, _ in self._parts()] or [np.arange(0)])

    def plan(self, settings: Mapping[str, Any], n: int, overwrite: bool) -> np.ndarray | None:
        there = super().plan(settings, n, overwrite)
        if there is not None and self.out.exists() and not there.all():
            if not overwrite:
                raise UserError(
                    f"{self.out} holds {there.sum()} images drawn so, and {n} are asked for; "
                    "use another --out, or --overwrite"
                )
            return None
        return there

    def _parts(self) -> list[tuple[int, int, Path]]:
        """(first, first after, file) in order."""
        paths = list(self.folder.iterdir()) if self.folder.is_dir() else []
        matches = [(match, path) for path in paths if (match := self.PART.fullmatch(path.name))]
        return sorted((int(match[1]), int(match[2]), path) for match, path in matches)

    def _is_ours(self, name: str) -> bool:
        return self.PART.fullmatch(name) is not None

    def _submit(self, pool: Executor, indices: np.ndarray, images: np.ndarray) -> None:
        """A part for each stretch of indices without a gap."""
        gaps = np.flatnonzero(np.diff(indices) != 1) + 1
        for stretch, part in zip(np.split(indices, gaps), np.split(images, gaps), strict=True):
            path = self.folder / f"{stretch[0]:09d}-{stretch[-1] + 1:09d}.npy"
            self._waiting.append(pool.submit(_save, path, part))

    def finish(self, settings: Mapping[str, Any], n: int, labels: np.ndarray | None) -> np.ndarray:
        parts = self._parts()
        first = np.concatenate([*islice(_pieces(parts), 64)])[:64]  # no piece is empty
        record = {"drawn": dict(settings), "images": n, "complete": True}
        with new_file(self.out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as stream:
                shape = (n, *first.shape[1:])
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, header)
                for piece in _pieces(parts):
                    stream.write(piece.tobytes())
            arrays = {"arr_1": labels, "drawn": np.asarray(json.dumps(record))}
            for name, array in arrays.items():
                if array is not None:
                    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
                        np.lib.format.write_array(stream, array, allow_pickle=False)
        shutil.rmtree(self.folder)
        return first


def _pieces(parts: list[tuple[int, int, Path]]) -> Iterator[np.ndarray]:
    """The images of all parts, each once: parts may overlap, where batches had another size before."""
    done = 0
    for start, stop, path in parts:
        assert start <= done
        if stop > done:
            yield np.load(path)[done - start :]
            done = stop


def _save(path: Path, images: np.ndarray) -> None:
    with new_file(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, images)


def _record(path: Path) -> dict[str, Any] | None:
    try:
        return _checked(read_json(path, None))
    except (OSError, ValueError):
        return None


def _checked(content: Any) -> dict[str, Any] | None:
    """A record of drawn images; a pipeline's own card has the same name, and is none."""
    known = isinstance(content, dict) and {"drawn", "images", "complete"} <= content.keys()
    return content if known else None
