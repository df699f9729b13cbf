"""Images, in memory or decoded when they are asked for, with their labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffkd.data.on_demand import OnDemand
from diffkd.data.packed import PackedStrings
from diffkd.data.streams import Listed

DIGESTED = 20_000


class Examples(Protocol):
    """What the batches of a stage are made of: images, pairs (`data.pairs`), or labels alone
    (`data.absent`)."""

    def indices(self, size: int, rng: torch.Generator) -> Tensor:
        """The indices of a random batch, (size,); the first numbers that `batch` draws from rng."""

    def batch(
        self, size: int, rng: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]] | tuple[Tensor, dict[str, Tensor], Tensor]:
        """x0 (B, C, H, W) float32 and what it is conditioned on, (B, ...) each, such as class_labels; of
        pairs also the noise. It depends on rng alone."""


@dataclass(frozen=True)
class Images:
    """pixels: (N, C, H, W) uint8, or what reads them when they are asked for. labels: (N,) int64
    or None. classes: their names. flip: mirror half of the images of a batch, at random. captions: one for
    each image, or none. listed: what was found of those that are streamed."""

    name: str
    pixels: np.ndarray | OnDemand
    labels: Tensor | None = None
    classes: list[str] = field(default_factory=list)
    flip: bool = False
    captions: Sequence[str] = field(default_factory=list)
    listed: Listed | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int | None:
        return None if self.labels is None else len(self.classes)

    @property
    def class_counts(self) -> list[int]:
        """The number of images of each class; [] without labels."""
        if self.labels is None:
            return []
        counts: list[int] = torch.bincount(self.labels, minlength=len(self.classes)).tolist()
        return counts

    def digest(self) -> str:
        """sha256 of shape, classes, labels and at most DIGESTED evenly spaced images; of images that are
        decoded when they are asked for their fingerprint, which reads none."""
        every = -(-len(self) // DIGESTED)
        total = hashlib.sha256(f"{self.pixels.shape} {self.classes} ".encode())
        total.update(b"" if self.labels is None else self.labels.numpy().tobytes())
        if isinstance(self.pixels, OnDemand):
            total.update(self.pixels.fingerprint.encode())
            total.update(self.pixels.files.tobytes())
        else:
            total.update(np.ascontiguousarray(self.pixels[::every]).tobytes())
        return total.hexdigest()

    def uint8(self, indices: Tensor | slice) -> Tensor:
        """The images at these indices, (B, C, H, W) uint8."""
        chosen = indices if isinstance(indices, slice) else indices.numpy()
        return torch.from_numpy(np.ascontiguousarray(self.pixels[chosen]))

    def read(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The images of these rows, (B, C, H, W) uint8; which of them could be read, (B,) bool; and the
        height and width that they had, (B, 2), of images in memory those that they have."""
        if isinstance(self.pixels, OnDemand):
            pixels, readable, sizes = map(torch.from_numpy, self.pixels.read(rows))
            return pixels, readable, sizes
        images = self.uint8(rows)
        sizes = torch.tensor([images.shape[2:]]).expand(len(images), 2)
        return images, torch.ones(len(images), dtype=torch.bool), sizes

    def in_turn(self, items: range, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """`read` of these items, so many at once; the next ones are read while the last are used."""
        parts = [
            slice(start, min(start + size, items.stop)) for start in range(items.start, items.stop, size)
        ]
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self.read, parts[0])
            for part in parts[1:]:
                found, ahead = ahead.result(), reader.submit(self.read, part)
                yield found
            yield ahead.result()

    def take(self, indices: Tensor) -> Images:
        """The images at these indices alone, decoded or not as they are here."""
        chosen, later = indices.numpy(), isinstance(self.pixels, OnDemand)
        captions = (self.captions[i] for i in chosen) if self.captions else ()
        return replace(
            self,
            pixels=self.pixels.take(chosen) if isinstance(self.pixels, OnDemand) else self.pixels[chosen],
            labels=None if self.labels is None else self.labels[indices],
            captions=PackedStrings(captions) if later else [*captions],
        )

    def indices(self, size: int, rng: torch.Generator) -> Tensor:
        """The indices of a random batch, (size,); the first numbers that `batch` draws from rng."""
        return torch.randint(len(self), (size,), generator=rng)

    def batch(self, size: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """A random batch: x0 (B, C, H, W) float32 in [-1, 1] and its class_labels; depends on rng alone."""
        indices = self.indices(size, rng)
        x0 = self.uint8(indices).float() / 127.5 - 1
        if self.flip:
            flipped = torch.rand(size, generator=rng) < 0.5
            x0[flipped] = x0[flipped].flip(-1)
        return x0, {} if self.labels is None else {"class_labels": self.labels[indices]}
