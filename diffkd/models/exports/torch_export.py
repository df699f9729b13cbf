"""A student's network as a program of torch, which needs torch alone: one .pt2."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from diffkd.models.exports import Student, program

FILE = "network.pt2"
DTYPE = torch.float32
NEEDS: tuple[str, ...] = ()
TAKES = "which is for networks that torch.export traces"
BOUND = 1e-4  # of what it computes
fits = program.fits


def write(student: Student, folder: Path) -> dict[str, Any]:
    found = program.traced(student)
    with _Remembering(folder / FILE, "w") as stream:
        with program.silent():
            torch.export.save(found, stream)
        if stream.error is not None:
            raise stream.error
    with program.silent():
        again: Any = torch.export.load(folder / FILE).module()
    program.check_same(student, again, BOUND)
    return {"export": program.write_beside(student, folder)}


class _Remembering(io.FileIO):
    """A file that takes what no longer fits on its disk and remembers why, since torch, told while it closes
    its archive, ends the process."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest and self.error is None:
            try:
                rest = rest[super().write(rest) :]
            except OSError as error:
                self.error = error
        return size
