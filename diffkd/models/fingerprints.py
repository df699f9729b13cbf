"""What tells one file of weights from another without reading all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from diffkd.io.files import read_json

WHOLE = 1 << 26  # bytes of a file up to which all of them count
PIECES, PIECE = 64, 1 << 20  # of a larger one: so many, evenly spaced, of so many bytes
CONFIGS = ("config.json", "tokenizer_config.json")
WRITTEN_BY = {  # keys of a config that say where it came from or what wrote it
    "_name_or_path", "name_or_path", "_commit_hash", "_diffusers_version", "transformers_version",
    "is_local", "local_files_only",
}  # fmt: skip


def of_files(paths: Iterable[Path]) -> str:
    """A hash of the contents of these files in their order, of large ones by their size and 64 MiB spread
    over them; what they are called and where they lie does not count, nor what wrote a config."""
    total = hashlib.sha256()
    for path in paths:
        total.update(of_file(path))
    return total.hexdigest()[:32]


def of_file(path: Path) -> bytes:
    """Of one file."""
    if path.name in CONFIGS:
        config = {key: value for key, value in read_json(path, {}).items() if key not in WRITTEN_BY}
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).digest()
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
