"""Forms in which a student is handed on, one file each: weights and what is needed to draw with them, for a
reader that is not diffkd.

A kind is a module in this folder with the names of `Kind`, called as the kind with _ for -.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from diffkd.errors import UserError

if TYPE_CHECKING:
    import torch

    from diffkd.core.denoiser import Denoiser

KINDS = ("single-file", "lora", "kohya", "onnx", "torch-export", "fp16", "int8")


class Student(NamedTuple):
    """What is exported. name: as the user gave it. folder: where it lies. card: the content of its
    diffkd.json. denoiser: it itself, whole where it is an adapter, in the dtype of the kind."""

    name: str
    folder: Path
    card: dict[str, Any]
    denoiser: Denoiser


class Kind(Protocol):
    """The contract of a kind's module."""

    @property
    def DTYPE(self) -> torch.dtype:
        """In which a student is read."""

    @property
    def NEEDS(self) -> tuple[str, ...]:
        """Packages beyond those that diffkd needs, the first named as its extra installs it."""

    @property
    def TAKES(self) -> str:
        """What it takes, for the message where a student does not fit."""

    def fits(self, student: Student) -> bool:
        """Whether the family of this student has it."""

    def write(self, student: Student, folder: Path) -> dict[str, Any]:
        """Writes it into a folder, without its card. Returns what the card says beside, or in place of, what
        it says of the student: `export`, of which `kind` is added. Raises UserError for a student that this
        form cannot hold."""


def find(name: str) -> Kind:
    return cast(Kind, importlib.import_module(f"{__name__}.{name.replace('-', '_')}"))


def fitting(student: Student) -> list[str]:
    """The kinds that there are for this student."""
    return [name for name in KINDS if find(name).fits(student)]


def check_installed(name: str) -> None:
    """Raises UserError where a package is missing without which this kind cannot be written."""
    missing = [one for one in find(name).NEEDS if find_spec(one) is None]
    if missing:
        raise UserError(
            f"--to {name} needs {', '.join(missing)}; install "
            f"{'it' if len(missing) == 1 else 'them'} with pip install {' '.join(missing)}"
        )
