"""Embeddings of prompts, computed once and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from diffkd.core.conditioning import Cond, Conditioner
from diffkd.data.packed import PackedStrings
from diffkd.data.shards import Rows, fitting, keyed

NULL = "null"
Progress = Callable[[int], None]  # called with so many more items


class Embeddings:
    """What a conditioner makes of the prompts of a dataset, in one folder; every different one is encoded
    once.

    prompts: of each item, in order; none where no item has one, which is the empty prompt. size: height and
    width of the images. Those of others may lie in the same folder.
    """

    def __init__(
        self, folder: Path, prompts: Sequence[str], size: tuple[int, int], conditioner: Conditioner
    ) -> None:
        self.given, self.size, self.conditioner = prompts, size, conditioner
        self.prompts = PackedStrings(dict.fromkeys(prompts or [""]))
        numbers = sum(value.numel() for value in conditioner.example.values())
        listed = hashlib.sha256("\0".join(self.prompts).encode()).hexdigest()
        recipe = {"conditioner": conditioner.key, "captions": listed, "size": [*size]}
        self.shards = keyed(folder, "embeddings", recipe, len(self.prompts), fitting(numbers))
        self._rows = Rows(self.shards)

    @cached_property
    def _place_of(self) -> Tensor:
        """The place in `prompts` of each item's."""
        place = {prompt: number for number, prompt in enumerate(self.prompts)}
        return torch.tensor([place[prompt] for prompt in self.given or [""]])

    def missing(self) -> list[int]:
        """The shards that are still to be written, by number."""
        return self.shards.missing()

    def left(self) -> int:
        """How many prompts are still to be encoded, no prompt among them."""
        ranges = self.shards.ranges()
        return sum(len(ranges[n]) for n in self.missing()) + (not self.shards.path(NULL).exists())

    def begin(self) -> None:
        """By one process, before any shard is written: the folder, and what stands for no prompt."""
        self.shards.begin()
        if not self.shards.path(NULL).exists():
            self.shards.write(NULL, self.conditioner.null())

    def fill(self, numbers: Sequence[int], on_items: Progress) -> None:
        """Writes these shards; then the encoders are freed."""
        for number in numbers:
            items = self.shards.ranges()[number]
            made = self.conditioner.embed(self.prompts[items.start : items.stop], self.size)
            self.shards.write(number, dict(made))
            on_items(len(items))
        self.conditioner.close()

    def null(self) -> Cond:
        """What the conditioner made of no prompt."""
        return self._rows.beside(NULL)

    @property
    def digest(self) -> str:
        """Of the prompts of all items, and of what encodes them."""
        total = hashlib.sha256(repr(sorted(self.shards.recipe.items())).encode())
        total.update(self._place_of.numpy().tobytes())
        return total.hexdigest()

    def cond(self, indices: Tensor) -> dict[str, Tensor]:
        """What the items at these indices are conditioned on, once nothing is missing."""
        places = self._place_of[indices % len(self._place_of)].tolist()
        return {
            key: torch.stack([self._rows(place, key) for place in places]) for key in self.conditioner.example
        }
