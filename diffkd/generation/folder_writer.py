"""Drawn images as one file each, in a folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np

from diffkd.errors import UserError
from diffkd.generation.encoding import FORMATS, file_name, read_image, write_images
from diffkd.generation.writer import LEFTOVER, RECORD, ImageWriter, ResumePlan, describe_difference, record_at
from diffkd.io import lock

OURS = re.compile(rf"(\d{{6,}})\.({'|'.join(FORMATS)})")


class FolderWriter(ImageWriter):
    """<index>.png or .webp in a folder, encoded by `workers` processes."""

    def __init__(self, out: Path, suffix: str, workers: int) -> None:
        super().__init__(out, out, workers)
        self.format = suffix

    def check(self) -> None:
        if self.out.is_file():
            raise UserError(f"--out {self.out} is a file; give a folder, or a name in .npz")
        there = {p.name for p in self.out.iterdir()} if self.out.is_dir() else set()
        ours = {
            name for name in there if self._is_ours(name) or name in lock.FILES or LEFTOVER.fullmatch(name)
        }
        if record_at(self.folder / RECORD) is not None:
            ours.add(RECORD)
        foreign = sorted(there - ours)
        if foreign or (self.out.exists() and self.out.resolve() == Path.cwd()):
            raise UserError(
                f"--out {self.out} holds more than images ({', '.join(foreign[:2])}); use another --out"
            )

    def plan(self, settings: Mapping[str, Any], n: int, overwrite: bool) -> ResumePlan:
        record, found = record_at(self.folder / RECORD), self.indices()
        why = None
        if record is None:
            why = "holds images, and nothing says how they were drawn" if len(found) else None
        elif (differ := describe_difference(record, settings)) or (found >= n).any():
            why = differ or f"holds {len(found)} images drawn so, and {n} are asked for"
        elif record["complete"] and overwrite:
            return ResumePlan.anew(n)
        if record is None and self.grid.exists():
            why = why or f"cannot begin: {self.grid.name} is there already"
        if why is not None:
            if not overwrite:
                raise self._refusal(why)
            return ResumePlan.anew(n)
        complete = record is not None and record["complete"] and record["images"] == n
        return ResumePlan.going_on(found, n, complete)

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
