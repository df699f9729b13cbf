"""Many strings in little memory: the names and captions of a million images."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np

ENCODING = "utf-8", "surrogatepass"  # names of files may hold bytes that are no text


class PackedStrings(Sequence[str]):
    """Strings as one run of UTF-8 and where each ends: eight bytes beside its own, and no object each."""

    def __init__(self, strings: Iterable[str]) -> None:
        text, ends = bytearray(), array("q", [0])
        for string in strings:
            text += string.encode(*ENCODING)
            ends.append(len(text))
        self._text: bytes | bytearray = text
        self._ends = np.frombuffer(ends, np.int64)

    @classmethod
    def of(cls, text: bytes, ends: np.ndarray) -> PackedStrings:
        """Of what `packed` gave."""
        made = cls(())
        made._text, made._ends = text, ends
        return made

    @property
    def packed(self) -> tuple[bytes, np.ndarray]:
        """The run of UTF-8, and where each string ends in it, (N + 1,) int64 from 0."""
        return bytes(self._text), self._ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        place = range(len(self))[index]
        return self._text[self._ends[place] : self._ends[place + 1]].decode(*ENCODING)


class PackedPaths(Sequence[Path]):
    """Files below a folder: of each there is its relative path, packed."""

    def __init__(self, root: Path, names: PackedStrings) -> None:
        self.root, self.names = root, names

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...

    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self.root / name for name in self.names[index]]
        return self.root / self.names[index]
