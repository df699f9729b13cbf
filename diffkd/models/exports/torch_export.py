"""A student's network as a program of torch, which needs torch alone: one .pt2."""

from __future__ import annotations

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
    with program.silent():
        torch.export.save(found, folder / FILE)
        again: Any = torch.export.load(folder / FILE).module()
    program.check_same(student, again, BOUND)
    return {"export": program.write_beside(student, folder)}
