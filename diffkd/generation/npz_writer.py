"""Images as one .npz, written in parts first."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from diffkd.errors import UserError
from diffkd.generation.resume import RECORD, ResumePlan, as_record, describe_difference, read_record
from diffkd.generation.writer import ImageWriter
from diffkd.io.files import new_file
from diffkd.io.npz import read_npz
from diffkd.io.text import from_json


class NpzWriter(ImageWriter):
    """One .npz: arr_0, uint8 NHWC, and arr_1, the labels, as in ADM's files.

    Until all images exist, parts are kept in a folder beside it; they are never all in memory.
    """

    PART = re.compile(r"(\d+)-(\d+)\.npy")  # the first image, and the one after the last

    def __init__(self, out: Path) -> None:
        super().__init__(out, out.with_name(f".{out.name}.parts"), workers=0)
        self.format = "npz"

    def check(self) -> None:
        if self.out.is_dir():
            raise UserError(f"--out {self.out} is a folder; give a file's name in .npz, or another folder")

    def plan(self, settings: Mapping[str, Any], n: int, overwrite: bool) -> ResumePlan:
        """By the parts where they have these settings, else by the finished file."""
        parts = read_record(self.folder / RECORD)
        resumable = parts is not None and not describe_difference(parts, settings)
        conflict = None
        if self.out.exists():
            record = self._embedded_record()
            if record is None:
                conflict = "already exists, without a record of its settings"
            elif (conflict := describe_difference(record, settings)) is None:
                if record["images"] == n and not overwrite:
                    return ResumePlan.resume(np.arange(n), n, complete=True)
                conflict = f"holds {record['images']} images of these settings, and {n} were requested"
        elif parts is not None and not resumable:
            conflict = describe_difference(parts, settings)
        elif parts is None and len(self.indices()):
            conflict = f"has parts in {self.folder.name} without a record of their settings"
        elif parts is None and self.grid.exists():
            conflict = f"cannot be written: {self.grid.name} already exists"
        if resumable and (self.indices() >= n).any():
            conflict, resumable = f"has parts of more than {n} images of these settings", False
        if conflict is not None and not overwrite:
            raise self._refusal(conflict)
        return ResumePlan.resume(self.indices(), n) if resumable else ResumePlan.from_scratch(n)

    def _embedded_record(self) -> dict[str, Any] | None:
        try:
            return as_record(from_json(str(read_npz(self.out, only=("drawn",))["drawn"])))
        except (ValueError, KeyError):
            return None

    def indices(self) -> np.ndarray:
        return np.concatenate([np.arange(start, stop) for start, stop, _ in self._parts()] or [np.arange(0)])

    def _parts(self) -> list[tuple[int, int, Path]]:
        """(first image, one after the last, file) of every whole part, ascending."""
        paths = list(self.folder.iterdir()) if self.folder.is_dir() else []
        matches = [(match, path) for path in paths if (match := self.PART.fullmatch(path.name))]
        parts = ((int(match[1]), int(match[2]), path) for match, path in matches)
        return sorted((start, stop, path) for start, stop, path in parts if _holds(path, stop - start))

    def _holds_images(self, name: str) -> bool:
        return self.PART.fullmatch(name) is not None

    def _submit(self, pool: Executor, indices: np.ndarray, images: np.ndarray) -> None:
        """Writes a part for each run of consecutive indices."""
        gaps = np.flatnonzero(np.diff(indices) != 1) + 1
        for run, part in zip(np.split(indices, gaps), np.split(images, gaps), strict=True):
            path = self.folder / f"{run[0]:09d}-{run[-1] + 1:09d}.npy"
            self._waiting.append(pool.submit(_save, path, part))

    def first(self, count: int) -> np.ndarray:
        return np.concatenate([*islice(_arrays(self._parts()), count)])[:count]  # none is empty

    def finish(self, settings: Mapping[str, Any], n: int, labels: np.ndarray | None) -> None:
        shape = (n, *self.first(1).shape[1:])
        record = {"drawn": dict(settings), "images": n, "complete": True}
        with new_file(self.out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as stream:
                _write_array(stream, shape, _arrays(self._parts()))
            others = {"arr_1": labels, "drawn": np.asarray(json.dumps(record))}
            if self.prompts:
                others["prompts"] = np.asarray(json.dumps([*self.prompts]))  # in turn
            for name, array in others.items():
                if array is not None:
                    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
                        np.lib.format.write_array(stream, array, allow_pickle=False)
        self._remove_parts()

    def _remove_parts(self) -> None:
        for path in self.folder.iterdir():
            if self._holds_images(path.name) or path.name == RECORD:
                path.unlink()


def _holds(path: Path, count: int) -> bool:
    """Whether a part has all of its images; what a failing machine cut short is drawn again."""
    try:
        return len(np.load(path, mmap_mode="r")) == count
    except (ValueError, EOFError, TypeError):  # TypeError: an array without a length
        return False


def _arrays(parts: list[tuple[int, int, Path]]) -> Iterator[np.ndarray]:
    """The images of all parts, each once: parts overlap where a resumed run had another batch size."""
    done = 0
    for start, stop, path in parts:
        assert start <= done
        if stop > done:
            yield np.load(path)[done - start :]
            done = stop


def _write_array(stream: IO[bytes], shape: tuple[int, ...], arrays: Iterable[np.ndarray]) -> None:
    """Concatenates uint8 arrays into one .npy. Not by numpy.save, whose errors hide that a disk is full."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    for array in arrays:
        stream.write(np.ascontiguousarray(array).data)


def _save(path: Path, images: np.ndarray) -> None:
    with new_file(path) as temporary, temporary.open("wb") as stream:
        _write_array(stream, images.shape, [images])
