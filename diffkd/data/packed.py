"""Many strings in little memory: the names and captions of a million images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np

ENCODING = "utf-8", "surrogatepass"  # names of files may hold bytes that are no text


class PackedStrings(Sequence[str]):
    """Strings as one run of UTF-8 and where each ends: eight bytes beside its own, and no object each."""

    def __init__(self, strings: Iterable[str]) -> None:
        text, ends = bytearray(), [0]
        for string in strings:
            text += string.encode(*ENCODING)
            ends.append(len(text))
        self._text, self._ends = bytes(text), np.array(ends, np.int64)

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
