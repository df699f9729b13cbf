"""Drawn images to disk while more are drawn: a folder of image files, or one .npz that grows in parts.

What is there is complete, at whatever moment the process ends, and the same drawing goes on from it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import re
import time
import zipfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock, Timeout

from diffkd.base import UserError
from diffkd.encoding import FORMATS, file_name, read_image, start_worker, write_images
from diffkd.runs import differences, new_file, read_json, write_json

RECORD = "diffkd.json"  # how images were drawn, beside them
OURS = re.compile(rf"(\d{{6,}})\.({'|'.join(FORMATS)})")
LEFT = re.compile(r"\..+\.tmp")  # half written, in the folder of pieces
# Written together: what is lost with a killed process is less than this, and drawn again.
TOGETHER, TOGETHER_BYTES, TOGETHER_SECONDS = 512, 1 << 20, 2.0


@dataclass(frozen=True)
class Plan:
    """there: (n,) bool, which images are. clear: whether what is there has to go first. complete: whether all
    is done."""

    there: bytes
    clear: bool = False
    complete: bool = False

    @staticmethod
    def anew(n: int) -> Plan:
        return Plan(bytes(n), clear=True)

    @staticmethod
    def going_on(indices: np.ndarray, n: int, complete: bool = False) -> Plan:
        there = np.zeros(n, bool)
        there[indices] = True
        return Plan(there.tobytes(), complete=complete and bool(there.all()))

    @property
    def missing(self) -> np.ndarray:
        return ~np.frombuffer(self.there, bool)


class Output(ABC):
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
        self._since = time.monotonic()
        self._lock: FileLock | None = None

    @abstractmethod
    def check(self) -> None:
        """Raises UserError where `out` cannot be written, or holds what is not ours to replace."""

    @abstractmethod
    def indices(self) -> np.ndarray:
        """Of the complete images, in any order."""

    @abstractmethod
    def plan(self, settings: Mapping[str, Any], n: int, overwrite: bool) -> Plan:
        """What is to be done for n images of these settings. Raises UserError where others are there, unless
        they may be overwritten."""

    @property
    def grid(self) -> Path:
        """Beside the images and not among them: a folder of images is what any tool of FID may read."""
        out = self.out.resolve()
        return out.with_suffix(".grid.png") if out.suffix == ".npz" else out.with_name(f"{out.name}-grid.png")

    def _refusal(self, why: str) -> UserError:
        return UserError(f"{self.out} {why}; use another --out, or --overwrite")

    def start(self, settings: Mapping[str, Any], n: int, overwrite: bool, plan: Plan) -> None:
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
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{self.out} is being written by another process; wait for it") from None
        self._lock = lock
        ours = "|".join(re.escape(path.name) for path in (self.out, self.grid))
        beside = re.compile(rf"\.({ours})\.\d+\.tmp")
        for path in [*self.folder.iterdir(), *self.out.resolve().parent.iterdir()]:
            within = path.parent == self.folder and LEFT.fullmatch(path.name)
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
        count = sum(len(indices) for indices, _ in self._held)
        many = count >= TOGETHER or count * images[:1].nbytes >= TOGETHER_BYTES
        if many or time.monotonic() - self._since > TOGETHER_SECONDS:
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
            (self.folder / ".lock").unlink(missing_ok=True)
            self._lock.release()
            self._lock = None
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # where nothing came of it


class ImageFolder(Output):
    """<index>.png or .webp in a folder, encoded by `workers` processes."""

    def __init__(self, out: Path, suffix: str, workers: int) -> None:
        super().__init__(out, out, workers)
        self.format = suffix

    def check(self) -> None:
        if self.out.is_file():
            raise UserError(f"--out {self.out} is a file; give a folder, or a name in .npz")
        there = {p.name for p in self.out.iterdir()} if self.out.is_dir() else set()
        ours = {name for name in there if self._is_ours(name) or name == ".lock" or LEFT.fullmatch(name)}
        if _record(self.folder / RECORD) is not None:
            ours.add(RECORD)
        foreign = sorted(there - ours)
        if foreign or (self.out.exists() and self.out.resolve() == Path.cwd()):
            raise UserError(
                f"--out {self.out} holds more than images ({', '.join(foreign[:2])}); use another --out"
            )

    def plan(self, settings: Mapping[str, Any], n: int, overwrite: bool) -> Plan:
        record, found = _record(self.folder / RECORD), self.indices()
        why = None
        if record is None:
            why = "holds images, and nothing says how they were drawn" if len(found) else None
        elif (differ := _otherwise(record, settings)) or (found >= n).any():
            why = differ or f"holds {len(found)} images drawn so, and {n} are asked for"
        elif record["complete"] and overwrite:
            return Plan.anew(n)
        if record is None and self.grid.exists():
            why = why or f"cannot begin: {self.grid.name} is there already"
        if why is not None:
            if not overwrite:
                raise self._refusal(why)
            return Plan.anew(n)
        complete = record is not None and record["complete"] and record["images"] == n
        return Plan.going_on(found, n, complete)

    def indices(self) -> np.ndarray:
        names = [p.name for p in self.folder.iterdir()] if self.folder.is_dir() else []
        return np.array([int(match[1]) for match in map(OURS.fullmatch, names) if match], dtype=np.int64)

    def _is_ours(self, name: str) -> bool:
        return OURS.fullmatch(name) is not None

    def _submit(self, pool: Executor, indices: np.ndarray, images: np.ndarray) -> None:
        task = pool.submit(write_images, self.folder, indices.tolist(), images, self.format)
        self._waiting.append(task)

    def first(self, count: int) -> np.ndarray:
        return np.stack([read_image(self.folder / file_name(i, self.format)) for i in range(count)])

    def finish(self, settings: Mapping[str, Any], n: int, labels: np.ndarray | None) -> None:
        self._say(settings, n, complete=True)

    def _remove_pieces(self) -> None:
        """Each image is a piece, and stays."""


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

    def plan(self, settings: Mapping[str, Any], n: int, overwrite: bool) -> Plan:
        """Of the parts where they are of these settings, and of the file else."""
        parts = _record(self.folder / RECORD)
        going_on = parts is not None and not _otherwise(parts, settings)
        why = None
        if self.out.exists():
            record = self._record_within()
            why = (
                "is there already, and nothing says how it was drawn"
                if record is None
                else (_otherwise(record, settings))
            )
            if record is not None and why is None:
                if record["images"] == n and not overwrite:
                    return Plan.going_on(np.arange(n), n, complete=True)
                why = f"holds {record['images']} images drawn so, and {n} are asked for"
        elif parts is not None and not going_on:
            why = _otherwise(parts, settings)
        elif parts is None and self.grid.exists():
            why = f"cannot begin: {self.grid.name} is there already"
        if going_on and (self.indices() >= n).any():
            why, going_on = f"has parts of more than {n} images drawn so", False
        if why is not None and not overwrite:
            raise self._refusal(why)
        return Plan.going_on(self.indices(), n) if going_on else Plan.anew(n)

    def _record_within(self) -> dict[str, Any] | None:
        try:
            with np.load(self.out) as arrays:
                return _checked(json.loads(str(arrays["drawn"])))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None

    def indices(self) -> np.ndarray:
        return np.concatenate([np.arange(start, stop) for start, stop, _ in self._parts()] or [np.arange(0)])

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

    def first(self, count: int) -> np.ndarray:
        return np.concatenate([*islice(_pieces(self._parts()), count)])[:count]  # no piece is empty

    def finish(self, settings: Mapping[str, Any], n: int, labels: np.ndarray | None) -> None:
        shape = (n, *self.first(1).shape[1:])
        record = {"drawn": dict(settings), "images": n, "complete": True}
        with new_file(self.out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as stream:
                _write_array(stream, shape, _pieces(self._parts()))
            arrays = {"arr_1": labels, "drawn": np.asarray(json.dumps(record))}
            for name, array in arrays.items():
                if array is not None:
                    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
                        np.lib.format.write_array(stream, array, allow_pickle=False)
        self._remove_pieces()

    def _remove_pieces(self) -> None:
        for path in self.folder.iterdir():
            if self._is_ours(path.name) or path.name == RECORD:
                path.unlink()


def _pieces(parts: list[tuple[int, int, Path]]) -> Iterator[np.ndarray]:
    """The images of all parts, each once: parts may overlap, where batches had another size before."""
    done = 0
    for start, stop, path in parts:
        assert start <= done
        if stop > done:
            yield np.load(path)[done - start :]
            done = stop


def _write_array(stream: IO[bytes], shape: tuple[int, ...], pieces: Iterable[np.ndarray]) -> None:
    """uint8 pieces as one .npy. Not by numpy.save: what a full disk is to it, it does not say."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    for piece in pieces:
        stream.write(np.ascontiguousarray(piece).data)


def _save(path: Path, images: np.ndarray) -> None:
    with new_file(path) as temporary, temporary.open("wb") as stream:
        _write_array(stream, images.shape, [images])


def _nothing() -> None:
    """What a worker does first."""


def _otherwise(record: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """How images of a record differ from those of these settings."""
    differ = differences(record["drawn"], json.loads(json.dumps(settings)))
    return f"holds images drawn otherwise ({'; '.join(differ[:3])})" if differ else None


def _record(path: Path) -> dict[str, Any] | None:
    try:
        return _checked(read_json(path, None))
    except (OSError, ValueError):
        return None


def _checked(content: Any) -> dict[str, Any] | None:
    """A record of drawn images; a pipeline's own card has the same name, and is none."""
    known = isinstance(content, dict) and {"drawn", "images", "complete"} <= content.keys()
    return content if known else None
