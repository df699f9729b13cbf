"""Runs without images: they learn from their teacher, and draw nothing but labels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Annotated, Literal, NoReturn

import torch
from pydantic import Field
from torch import Tensor

from diffkd.errors import UserError
from diffkd.io.config import Strict


@dataclass(frozen=True)
class Unseen:
    """What stands for `Images` where there are none. shape: (C, H, W). class_counts: how often each label is
    drawn, in proportion; [] for an unconditional model."""

    shape: tuple[int, int, int]
    class_counts: list[int]
    name: str = "none"
    labels: None = None
    classes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return 0

    def digest(self) -> str:
        return hashlib.sha256(f"{self.shape} {self.class_counts}".encode()).hexdigest()

    def uint8(self, indices: slice) -> Tensor:
        """As many images as the slice asks for, black."""
        return torch.zeros(len(range(indices.stop)[indices]), *self.shape, dtype=torch.uint8)

    def indices(self, size: int, rng: torch.Generator) -> Tensor:
        """There is nothing to be found again: places in the batch."""
        return torch.arange(size)

    def batch(self, size: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """x0 of the right shape, NaN so that no method can learn from it unnoticed, and random labels."""
        x0 = torch.full((size, *self.shape), torch.nan)
        if not self.class_counts:
            return x0, {}
        shares = torch.tensor(self.class_counts, dtype=torch.float64)
        return x0, {"class_labels": torch.multinomial(shares, size, replacement=True, generator=rng)}


class NoData(Strict):
    """No images: for methods that learn from the teacher alone."""

    kind: Literal["none"]
    class_counts: list[Annotated[int, Field(ge=0, le=1 << 40)]] | None = Field(
        None, min_length=1, description="how often each class is drawn, in proportion; default all alike"
    )

    def load(self) -> NoReturn:
        """Raises UserError: this is for `diffkd distill`, which says for which model (`of`)."""
        raise UserError(
            "data kind none has no images to train on; it is for diffkd distill with a method that needs "
            "none (diffkd methods says which)"
        )

    def of(self, shape: tuple[int, int, int] | None, num_classes: int | None) -> Unseen:
        """What a model of these images and classes is distilled with. Raises UserError for counts that are
        not one for each of its classes."""
        if shape is None:
            raise UserError(
                "data kind none takes the size of images from the teacher, which has none; name the data"
            )
        counts = self.class_counts
        if counts is not None and (len(counts) != num_classes or not any(counts)):
            has = "is unconditional" if num_classes is None else f"has {num_classes} classes"
            raise UserError(
                f"data.class_counts {counts} does not fit the teacher, which {has}; give one number for each "
                "class, not all 0, or leave it out"
            )
        return Unseen(shape, counts or [1] * (num_classes or 0))
