"""Tensors whose rows lie in several files, one of each process that held some of them.

`student-00001-of-00004.safetensors` has the second process's rows of every tensor of `student`: a tensor is
its parts, one below the other in the order of the files. What all processes hold whole is in the first alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

SUFFIX = ".safetensors"
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})")


def file_name(name: str, rank: int, world: int) -> str:
    """Of the tensors called `name` that a process holds; one process alone needs no number."""
    return f"{name}{SUFFIX}" if world == 1 else f"{name}-{rank:05d}-of-{world:05d}{SUFFIX}"


def is_divided(files: Iterable[str]) -> bool:
    """Whether these files of a checkpoint hold parts."""
    return any(PART.fullmatch(file.removesuffix(SUFFIX)) for file in files)


class Divided:
    """A tensor in parts that are read when asked for. shape: of the whole."""

    def __init__(self, name: str, files: Iterable[Any]) -> None:
        """files: opened, in their order."""
        self._name, self._files = name, [*files]
        shapes = [tuple(file.get_slice(name).get_shape()) for file in self._files]
        self._counts = [shape[0] if shape else 1 for shape in shapes]
        self.shape = torch.Size((sum(self._counts), *shapes[0][1:]) if shapes[0] else ())

    def whole(self) -> Tensor:
        parts = [file.get_tensor(self._name) for file in self._files]
        return torch.cat(parts) if self.shape else parts[0]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, at least one; all of a scalar."""
        if not self.shape:
            return self.whole()
        found, at = [], 0
        for file, count in zip(self._files, self._counts, strict=True):
            low, high = max(start - at, 0), min(stop - at, count)
            if low < high:
                found.append(file.get_slice(self._name)[low:high])
            at += count
        return torch.cat(found)


def opened(folder: Path, files: Iterable[str]) -> dict[str, Mapping[str, Divided]]:
    """The tensors of a checkpoint in parts, by what they are of and by name; nothing of them is read yet."""
    of: dict[str, dict[str, list[Any]]] = {}
    for file in sorted(files):
        found = PART.fullmatch(file.removesuffix(SUFFIX))
        assert found is not None, file
        held = safe_open(folder / file, framework="pt")
        names = of.setdefault(found[1], {})
        for name in held.keys():  # noqa: SIM118
            names.setdefault(name, []).append(held)
    return {one: {name: Divided(name, held) for name, held in names.items()} for one, names in of.items()}
