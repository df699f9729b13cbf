"""What is computed once and kept: tensors in safetensors files of one folder, all made by one recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffkd.errors import UserError
from diffkd.io.files import new_file, read_json, write_json
from diffkd.io.text import log, quoted, reason


class Shards:
    """Files of `in_shard` items each, the last one shorter; a file is whole or absent.

    what: what messages call the items; also the name of the file that holds the recipe. Raises UserError for
    a folder whose items are of another recipe, or that holds something else.
    """

    def __init__(self, folder: Path, what: str, recipe: Mapping[str, Any], count: int, in_shard: int) -> None:
        self.folder, self.what, self.recipe = folder, what, dict(recipe)
        self.count, self.in_shard = count, in_shard
        self._check()

    @property
    def manifest(self) -> Path:
        return self.folder / f"{self.what}.json"

    def _check(self) -> None:
        path, what = self.manifest, self.what
        try:
            known = read_json(path, None)
            entries = [] if known is not None or not self.folder.exists() else [*self.folder.iterdir()]
        except (OSError, ValueError) as error:
            raise UserError(f"{what} {path} cannot be read ({reason(error)}); use another folder") from error
        if any(not entry.name.startswith(".") for entry in entries):
            raise UserError(f"{what} {self.folder} is not empty and holds no {what}; use another folder")
        if known is not None and known != self.recipe:
            known = known if isinstance(known, dict) else {}
            keys = [*self.recipe, *(key for key in known if key not in self.recipe)]
            key = next(key for key in keys if known.get(key) != self.recipe.get(key))
            raise UserError(
                f"{what} {self.folder} are of another {key} ({_short(known.get(key))}, and here it is "
                f"{_short(self.recipe.get(key))}); use another folder, or delete this one"
            )

    def begin(self) -> None:
        """Makes the folder and says in it what it holds; by one process, before any shard is written."""
        if not self.manifest.exists():
            write_json(self.manifest, self.recipe)

    def ranges(self) -> list[range]:
        """The items of each shard."""
        starts = range(0, self.count, self.in_shard)
        return [range(start, min(start + self.in_shard, self.count)) for start in starts]

    def path(self, shard: int | str) -> Path:
        """Of a shard by its number, or of something beside them by its name."""
        return self.folder / f"{f'{shard:06d}' if isinstance(shard, int) else shard}.safetensors"

    def read(self, number: int, check: Callable[[dict[str, Tensor]], None]) -> dict[str, Tensor] | None:
        """The tensors of a shard, mapped and not read but for their sha256; None where it is not there, or
        with a warning where it was damaged. check: raises ValueError for tensors that cannot be its own."""
        path = self.path(number)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                told = (file.metadata() or {}).get("sha256")
            check(tensors)
            if told != _digest(tensors):
                raise ValueError("it was altered")
        except (SafetensorError, KeyError, ValueError) as error:
            log.warning("%s cannot be used (%s); it is made again", path, reason(error))
            return None
        return tensors

    def write(self, shard: int | str, tensors: dict[str, Tensor]) -> None:
        """One file, whole; tensors on the host."""
        tensors = {key: value.contiguous() for key, value in tensors.items()}
        with new_file(self.path(shard)) as temporary:
            save_file(tensors, temporary, metadata={"sha256": _digest(tensors)})


def _digest(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for key in sorted(tensors):
        total.update(f"{key} {tuple(tensors[key].shape)} {tensors[key].dtype} ".encode())
        total.update(tensors[key].view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _short(value: Any) -> str:
    """A digest by its first characters, anything else as it is."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else quoted(value)
