"""What tells one file of weights from another without reading all of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

WHOLE = 1 << 26  # bytes of a file up to which all of them count
PIECES, PIECE = 64, 1 << 20  # of a larger one: so many, evenly spaced, of so many bytes


def of_folder(*folders: Path) -> str:
    """A hash of every file in these folders, of large ones by their size and 64 MiB spread over them: names
    relative to the folder and contents count, and where it lies does not."""
    total = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            total.update(f"{path.relative_to(folder)} ".encode())
            total.update(of_file(path))
    return total.hexdigest()[:32]


def of_file(path: Path) -> bytes:
    """The same of one file."""
    size = path.stat().st_size
    total = hashlib.sha256(f"{size} ".encode())
    with path.open("rb") as file:
        if size <= WHOLE:
            total.update(file.read())
        else:
            for number in range(PIECES):
                file.seek((size - PIECE) * number // (PIECES - 1))
                total.update(file.read(PIECE))
    return total.digest()
