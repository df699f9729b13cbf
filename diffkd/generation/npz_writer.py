"""Drawn images as one .npz, which grows in parts."""

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
from diffkd.generation.writer import RECORD, ImageWriter, ResumePlan, checked, describe_difference, record_at
from diffkd.io.files import new_file
from diffkd.io.npz import read_npz
from diffkd.io.text import from_json


class NpzWriter(ImageWriter):
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

    def plan(self, settings: Mapping[str, Any], n: int, overwrite: bool) -> ResumePlan:
        """Of the parts where they are of these settings, and of the file else."""
        parts = record_at(self.folder / RECORD)
        going_on = parts is not None and not describe_difference(parts, settings)
        why = None
        if self.out.exists():
            record = self._record_within()
            why = (
                "is there already, and nothing says how it was drawn"
                if record is None
                else (describe_difference(record, settings))
            )
            if record is not None and why is None:
                if record["images"] == n and not overwrite:
                    return ResumePlan.going_on(np.arange(n), n, complete=True)
                why = f"holds {record['images']} images drawn so, and {n} are asked for"
        elif parts is not None and not going_on:
            why = describe_difference(parts, settings)
        elif parts is None and self.grid.exists():
            why = f"cannot begin: {self.grid.name} is there already"
        if going_on and (self.indices() >= n).any():
            why, going_on = f"has parts of more than {n} images drawn so", False
        if why is not None and not overwrite:
            raise self._refusal(why)
        return ResumePlan.going_on(self.indices(), n) if going_on else ResumePlan.anew(n)

    def _record_within(self) -> dict[str, Any] | None:
        try:
            return checked(from_json(str(read_npz(self.out, only=("drawn",))["drawn"])))
        except (ValueError, KeyError):
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
