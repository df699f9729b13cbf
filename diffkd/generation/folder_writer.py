"""Images as files in a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np

from diffkd.errors import UserError
from diffkd.generation.encoding import FORMATS, file_name, read_image, write_images
from diffkd.generation.resume import RECORD, ResumePlan, describe_difference, read_record
from diffkd.generation.writer import LEFTOVER, ImageWriter
from diffkd.io import lock
from diffkd.io.text import reason

IMAGE = re.compile(rf"(\d{{6,}})\.({'|'.join(FORMATS)})")


class FolderWriter(ImageWriter):
    """<index>.png or .webp in a folder, encoded by `workers` processes."""

    def __init__(self, out: Path, suffix: str, workers: int) -> None:
        super().__init__(out, out, workers)
        self.format = suffix

    def check(self) -> None:
        if self.out.is_file():
            raise UserError(f"--out {self.out} is a file; give a folder, or a name in .npz")
        names = {p.name for p in self.out.iterdir()} if self.out.is_dir() else set()
        ours = {n for n in names if self._holds_images(n) or n in lock.FILES or LEFTOVER.fullmatch(n)}
        if read_record(self.folder / RECORD) is not None:
            ours.add(RECORD)
        foreign = sorted(names - ours)
        if foreign or (self.out.exists() and os.path.realpath(self.out) == os.getcwd()):
            raise UserError(
                f"--out {self.out} holds other files than images ({', '.join(foreign[:2])}); use another "
                "--out"
            )

    def plan(self, settings: Mapping[str, Any], n: int, overwrite: bool) -> ResumePlan:
        record, existing = read_record(self.folder / RECORD), self.indices()
        conflict = None
        if record is None:
            conflict = "holds images without a record of their settings" if len(existing) else None
        elif (difference := describe_difference(record, settings)) or (existing >= n).any():
            conflict = difference or f"holds {len(existing)} images of these settings, and {n} were requested"
        elif record["complete"] and overwrite:
            return ResumePlan.from_scratch(n)
        if record is None and self.grid.exists():
            conflict = conflict or f"cannot be written: {self.grid.name} already exists"
        if conflict is not None:
            if not overwrite:
                raise self._refusal(conflict)
            return ResumePlan.from_scratch(n)
        complete = record is not None and record["complete"] and record["images"] == n
        return ResumePlan.resume(existing, n, complete)

    def indices(self) -> np.ndarray:
        names = [p.name for p in self.folder.iterdir()] if self.folder.is_dir() else []
        return np.array([int(match[1]) for match in map(IMAGE.fullmatch, names) if match], dtype=np.int64)

    def _holds_images(self, name: str) -> bool:
        return IMAGE.fullmatch(name) is not None

    def _submit(self, pool: Executor, indices: np.ndarray, images: np.ndarray) -> None:
        prompts = self.prompts or ()
        texts = [prompts[i % len(prompts)] for i in indices.tolist()] if prompts else None
        task = pool.submit(write_images, self.folder, indices.tolist(), images, self.format, texts)
        self._waiting.append(task)

    def first(self, count: int) -> np.ndarray:
        return np.stack([self._read(self.folder / file_name(i, self.format)) for i in range(count)])

    @staticmethod
    def _read(path: Path) -> np.ndarray:
        try:
            if not path.is_file():  # opening a pipe would wait for somebody to write into it
                raise OSError("it is missing, or a pipe or a device")
            return read_image(path)
        except (OSError, ValueError, SyntaxError) as error:  # as Pillow does for broken files
            raise UserError(
                f"{path} cannot be read ({reason(error)}); delete it, and the same command draws it again"
            ) from error

    def finish(self, settings: Mapping[str, Any], n: int, labels: np.ndarray | None) -> None:
        self._write_record(settings, n, complete=True)

    def _remove_parts(self) -> None:
        """Nothing: the parts are the images themselves."""
