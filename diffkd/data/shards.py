"""What is computed once and kept: tensors in safetensors files of one folder, all made by one recipe."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
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

SHARD_BYTES = 1 << 26
OPEN_FILES = 64  # that are kept mapped
KEY = 16  # hexadecimal digits of a folder's name


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

    def alone(self) -> bool:
        """Whether none of these is there, while `keyed` ones of other recipes lie beside them."""
        return not self.manifest.exists() and any(self.folder.parent.glob(f"*/{self.what}.json"))

    def ranges(self) -> list[range]:
        """The items of each shard."""
        starts = range(0, self.count, self.in_shard)
        return [range(start, min(start + self.in_shard, self.count)) for start in starts]

    def missing(self) -> list[int]:
        """The shards that are not there, by number."""
        return [number for number in range(len(self.ranges())) if not self.path(number).exists()]

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


def keyed(folder: Path, what: str, recipe: Mapping[str, Any], count: int, in_shard: int) -> Shards:
    """Shards in a folder of their recipe's own below this one, where those of other recipes may lie too."""
    recipe = {**recipe, "in_shard": in_shard}
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:KEY]
    return Shards(folder / what / key, what, recipe, count, in_shard)


class Rows:
    """Single items of shards that are all there, read by mapping the files that were used last."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self._files, self._lock = OrderedDict[Path, Any](), threading.Lock()

    def __call__(self, index: int, key: str) -> Tensor:
        """One tensor of an item. Raises UserError where its file is damaged or gone."""
        size = self.shards.in_shard
        row: Tensor = self._open(self.shards.path(index // size)).get_slice(key)[index % size]
        return row

    def whole(self, number: int, key: str) -> Tensor | None:
        """A tensor of a shard; None where it has none of this name."""
        file = self._open(self.shards.path(number))
        return file.get_tensor(key) if key in file.keys() else None  # noqa: SIM118

    def beside(self, name: str) -> dict[str, Tensor]:
        """All tensors of a file beside the shards. Raises UserError where it is damaged or gone."""
        file = self._open(self.shards.path(name))
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def _open(self, path: Path) -> Any:
        """A file, mapped."""
        with self._lock:  # batches are made ahead by a thread
            if path not in self._files:
                try:
                    self._files[path] = safe_open(path, framework="pt")
                except (OSError, SafetensorError) as error:
                    raise UserError(
                        f"{path} cannot be read ({reason(error)}); delete it, and the same command makes "
                        "it again"
                    ) from error
                if len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)
            self._files.move_to_end(path)
            return self._files[path]


def fitting(numbers: int) -> int:
    """How many items of so many float32 numbers a file holds."""
    return max(1, SHARD_BYTES // (4 * max(1, numbers)))


def _digest(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for key in sorted(tensors):
        total.update(f"{key} {tuple(tensors[key].shape)} {tensors[key].dtype} ".encode())
        total.update(tensors[key].view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _short(value: Any) -> str:
    """A digest by its first characters, anything else as it is."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else quoted(value)
