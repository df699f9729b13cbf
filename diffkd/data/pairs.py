"""Pairs of a noise and the image that a teacher makes of it, drawn once and kept on disk.

Only images and labels are stored: the noise of pair i is that of `torch.Generator().manual_seed(seed + i)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkd.core.conditioning import Cond
from diffkd.core.samplers import randn
from diffkd.data.shards import Shards

SCHEMA = 1
IN_SHARD, SHARD_BYTES = 256, 1 << 26  # pairs in a file, and at most so many bytes of images


@dataclass(frozen=True)
class Recipe:
    """All that the images of pairs depend on. teacher: its identity. classes: how often each class is drawn,
    in proportion; [] without labels. shape: (C, H, W). seed: noise of pair i is that of seed + i. prompts:
    digest of what stands for the prompts, "" for a model without."""

    teacher: str
    sampler: str
    steps: int
    guidance: float
    seed: int
    classes: Sequence[int]
    shape: Sequence[int]
    prompts: str = ""

    def described(self) -> dict[str, Any]:
        fields = {**asdict(self), "classes": [*self.classes], "shape": [*self.shape]}
        return {"schema": SCHEMA, **{key: value for key, value in fields.items() if value != ""}}


class PairCache:
    """The first `count` pairs of a recipe, in safetensors shards of one folder, as examples to learn from.

    cond: what pairs are conditioned on beside their label, by their indices (B,). A shard's sha256 is checked
    when it is opened. Raises UserError as `Shards`.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, count: int, cond: Callable[[Tensor], Cond] = lambda indices: {}
    ) -> None:
        self.folder, self.recipe, self.count, self.cond = folder, recipe, count, cond
        in_shard = max(1, min(IN_SHARD, SHARD_BYTES // (4 * torch.Size(recipe.shape).numel())))
        self.files = Shards(folder, "pairs", recipe.described(), count, in_shard)
        self._shards: dict[int, dict[str, Tensor]] = {}

    def begin(self) -> None:
        """See `Shards.begin`."""
        self.files.begin()

    def shards(self) -> list[range]:
        """The pairs of each shard."""
        return self.files.ranges()

    def missing(self) -> list[int]:
        """The shards that are still to be written, by number; opens the others. One that was damaged is
        among them, with a warning."""
        return [number for number, pairs in enumerate(self.shards()) if not self._open(number, len(pairs))]

    def _open(self, number: int, least: int) -> bool:
        """Whether a shard is there with so many pairs, which are then at hand."""
        tensors = self.files.read(number, self._check)
        if tensors is None:
            return False
        self._shards[number] = tensors
        return len(tensors["x0"]) >= least

    def _check(self, tensors: dict[str, Tensor]) -> None:
        x0, labels = tensors["x0"], tensors.get("labels")
        if x0.shape[1:] != torch.Size(self.recipe.shape) or x0.dtype != torch.float32:
            raise ValueError(f"it holds {tuple(x0.shape)} {x0.dtype}")
        if (labels is None) == bool(self.recipe.classes):
            raise ValueError("it was altered")

    def write(self, number: int, x0: Tensor, labels: Tensor | None) -> None:
        """One shard, whole. x0: (n, C, H, W) float32 on the host; labels: (n,) int64."""
        self.files.write(number, {"x0": x0} | ({} if labels is None else {"labels": labels}))

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

    def batch(self, size: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Random pairs: x0 (B, C, H, W) float32, their labels, and the noises that they were made of."""
        chosen = self.indices(size, rng)
        indices = chosen.tolist()
        size_of = self.files.in_shard
        found = [(self._shards[i // size_of], i % size_of) for i in indices]
        x0 = torch.stack([shard["x0"][place] for shard, place in found])
        cond = {"class_labels": [shard["labels"][i] for shard, i in found]} if self.recipe.classes else {}
        labels = {key: torch.stack(values) for key, values in cond.items()}
        return x0, {**self.cond(chosen), **labels}, self.noise(indices)


class DrawnImages:
    """The images of pairs, as examples in place of a dataset's: their noises are left out."""

    def __init__(self, pairs: PairCache) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def indices(self, size: int, rng: torch.Generator) -> Tensor:
        return self.pairs.indices(size, rng)

    def batch(self, size: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Random ones: x0 (B, C, H, W) float32, and what they are conditioned on."""
        x0, cond, _ = self.pairs.batch(size, rng)
        return x0, cond
