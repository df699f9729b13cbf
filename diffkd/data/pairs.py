"""Pairs of a noise and the image that a teacher makes of it, drawn once and kept on disk.

Only images and labels are stored: the noise of pair i is that of `torch.Generator().manual_seed(seed + i)`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffkd.core.samplers import randn
from diffkd.errors import UserError
from diffkd.io.files import new_file, read_json, write_json
from diffkd.io.text import log, quoted, reason

MANIFEST = "pairs.json"
SCHEMA = 1
IN_SHARD, SHARD_BYTES = 256, 1 << 26  # pairs in a file, and at most so many bytes of images


@dataclass(frozen=True)
class Recipe:
    """All that the images of pairs depend on. teacher: its identity. classes: how often each class is drawn,
    in proportion; [] without labels. shape: (C, H, W). seed: noise of pair i is that of seed + i."""

    teacher: str
    sampler: str
    steps: int
    guidance: float
    seed: int
    classes: Sequence[int]
    shape: Sequence[int]

    def described(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self), "classes": [*self.classes], "shape": [*self.shape]}


class PairCache:
    """The first `count` pairs of a recipe, in safetensors shards of one folder, as examples to learn from.

    A shard is whole or absent, and its sha256 is checked when it is opened. Raises UserError for a folder
    whose pairs are of another recipe, or that holds something else.
    """

    def __init__(self, folder: Path, recipe: Recipe, count: int) -> None:
        self.folder, self.recipe, self.count = folder, recipe, count
        self.in_shard = max(1, min(IN_SHARD, SHARD_BYTES // (4 * torch.Size(recipe.shape).numel())))
        self._shards: dict[int, dict[str, Tensor]] = {}
        self._check()

    def _check(self) -> None:
        path = self.folder / MANIFEST
        try:
            known = read_json(path, None)
            entries = [] if known is not None or not self.folder.exists() else [*self.folder.iterdir()]
        except (OSError, ValueError) as error:
            raise UserError(f"pairs {path} cannot be read ({reason(error)}); use another folder") from error
        if any(not entry.name.startswith(".") for entry in entries):
            raise UserError(f"pairs {self.folder} is not empty and holds no pairs; use another folder")
        wanted = self.recipe.described()
        if known is not None and known != wanted:
            known = known if isinstance(known, dict) else {}
            key = next(key for key in wanted if known.get(key) != wanted[key])
            raise UserError(
                f"pairs {self.folder} are of another {key} ({_short(known.get(key))}, and here it is "
                f"{_short(wanted[key])}); use another folder, or delete this one"
            )

    def begin(self) -> None:
        """Makes the folder and says in it what its pairs are; by one process, before any shard is written."""
        if not (self.folder / MANIFEST).exists():
            write_json(self.folder / MANIFEST, self.recipe.described())

    def shards(self) -> list[range]:
        """The pairs of each shard."""
        starts = range(0, self.count, self.in_shard)
        return [range(start, min(start + self.in_shard, self.count)) for start in starts]

    def missing(self) -> list[int]:
        """The shards that are still to be written, by number; opens the others. One that was damaged is
        among them, with a warning."""
        return [number for number, pairs in enumerate(self.shards()) if not self._open(number, len(pairs))]

    def _open(self, number: int, least: int) -> bool:
        """Whether a shard is there with so many pairs, which are then at hand, mapped and not read."""
        path = self._path(number)
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                told = (file.metadata() or {}).get("sha256")
            x0, labels = tensors["x0"], tensors.get("labels")
            if x0.shape[1:] != torch.Size(self.recipe.shape) or x0.dtype != torch.float32:
                raise ValueError(f"it holds {tuple(x0.shape)} {x0.dtype}")
            if (labels is None) == bool(self.recipe.classes) or told != _digest(tensors):
                raise ValueError("it was altered")
        except (SafetensorError, KeyError, ValueError) as error:
            log.warning("%s cannot be used (%s); it is drawn again", path, reason(error))
            return False
        self._shards[number] = tensors
        return len(x0) >= least

    def write(self, number: int, x0: Tensor, labels: Tensor | None) -> None:
        """One shard, whole. x0: (n, C, H, W) float32 on the host; labels: (n,) int64."""
        tensors = {"x0": x0.contiguous()} | ({} if labels is None else {"labels": labels.contiguous()})
        with new_file(self._path(number)) as temporary:
            save_file(tensors, temporary, metadata={"sha256": _digest(tensors)})

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def generators(self, indices: Sequence[int]) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(self.recipe.seed + i) for i in indices]

    def noise(self, indices: Sequence[int]) -> Tensor:
        """Those of these pairs, (B, C, H, W) float32."""
        return randn((len(indices), *self.recipe.shape), self.generators(indices), torch.empty(0))

    # as examples (`images.Examples`), once no shard is missing

    def __len__(self) -> int:
        return self.count

    def indices(self, size: int, rng: torch.Generator) -> Tensor:
        return torch.randint(self.count, (size,), generator=rng)

    def batch(self, size: int, rng: torch.Generator) -> tuple[Tensor, Tensor | None, Tensor]:
        """Random pairs: x0 (B, C, H, W) float32, their labels, and the noises that they were made of."""
        indices = self.indices(size, rng).tolist()
        found = [(self._shards[i // self.in_shard], i % self.in_shard) for i in indices]
        x0 = torch.stack([shard["x0"][place] for shard, place in found])
        labels = torch.stack([shard["labels"][i] for shard, i in found]) if self.recipe.classes else None
        return x0, labels, self.noise(indices)


def _digest(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for key in sorted(tensors):
        total.update(f"{key} {tuple(tensors[key].shape)} {tensors[key].dtype} ".encode())
        total.update(tensors[key].numpy().tobytes())
    return total.hexdigest()


def _short(value: Any) -> str:
    """A digest by its first characters, anything else as it is."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else quoted(value)
