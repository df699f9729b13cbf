"""Runs without images: they learn from their teacher, and are given nothing but labels or prompts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffkd.errors import UserError
from diffkd.io.config import Strict
from diffkd.io.prompts import read_prompts


@dataclass(frozen=True)
class Unseen:
    """What stands for `Images` where there are none. shape: (C, H, W). class_counts: how often each label is
    drawn, in proportion; [] for an unconditional model. captions: of a model of prompts, these."""

    shape: tuple[int, int, int]
    class_counts: list[int]
    name: str = "none"
    labels: None = None
    classes: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)

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


class TeacherDraws(Strict):
    """What is common to data without images: those that the teacher draws instead, once, for methods that
    learn from images."""

    draws: int | None = Field(None, ge=1, le=10_000_000, description="images that the teacher draws instead")
    steps: int = Field(20, ge=1, le=100_000, description="of the teacher, for each of its draws")
    sampler: Literal["ddim", "heun", "dpmpp_2m"] = Field("ddim", description="of the teacher's draws")
    guidance: float | None = Field(
        None, ge=0, description="of the teacher's draws; default what the run bakes in"
    )

    def count(self) -> int:
        """How many images the teacher draws; 0 for none."""
        return self.draws or 0


class NoData(TeacherDraws):
    """No images: for methods that learn from the teacher alone, or from what it draws."""

    kind: Literal["none"]
    class_counts: list[Annotated[int, Field(ge=0, le=1 << 40)]] | None = Field(
        None, min_length=1, description="how often each class is drawn, in proportion; default all alike"
    )

    @model_validator(mode="after")
    def _drawn(self) -> NoData:
        given = sorted({"steps", "sampler", "guidance"}.intersection(self.model_fields_set))
        if self.draws is None and given:
            raise ValueError(f"data.{given[0]} is of images that the teacher draws; set data.draws, how many")
        return self

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


class Prompts(TeacherDraws):
    """Prompts alone, of a text file with one a line: for methods that learn from the teacher alone, or from
    what it draws."""

    kind: Literal["prompts"]
    path: Path = Field(description="the text file")
    draws: int | None = Field(
        None, ge=1, le=10_000_000, description="images that the teacher draws; default one for each prompt"
    )

    def count(self) -> int:
        """How many images the teacher draws."""
        return self.draws or len(self.prompts())

    def prompts(self) -> list[str]:
        return read_prompts(self.path)

    def load(self) -> NoReturn:
        """Raises UserError: see `NoData.load`."""
        raise UserError(
            "data kind prompts has no images to train on; name images, or distil a model that is trained"
        )

    def of(self, shape: tuple[int, int, int] | None, num_classes: int | None) -> Unseen:
        """What a model of images of this shape, and of no classes, is distilled with."""
        if shape is None:
            raise UserError(
                "data kind prompts takes the size of images from the teacher, which has none; name the data"
            )
        return Unseen(shape, [], str(self.path), captions=self.prompts())
