"""The latents of images of several shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from diffkd.core.conditioning import Codec, Conditioner
from diffkd.data.buckets import BucketedImages
from diffkd.data.embeddings import Progress
from diffkd.data.images import Images
from diffkd.data.latents import Conditions, LatentCache
from diffkd.data.shards import Shards


class BucketedLatents(Conditions):
    """A cache for each bucket, all in one folder, and the embeddings of all captions.

    A batch is of one bucket, which is drawn by its share of the images. What is asked for by index, such as
    the conditions of images that are drawn, is of the most frequent shape alone.
    """

    images: BucketedImages

    def __init__(
        self, folder: Path, images: BucketedImages, codec: Codec, conditioner: Conditioner | None
    ) -> None:
        super().__init__(folder, images, codec, conditioner)
        self.parts = [LatentCache(folder, part, codec, None) for part in images.parts]
        self._firsts = torch.tensor([0, *map(len, images.parts)]).cumsum(0).tolist()

    def __len__(self) -> int:
        return len(self.parts[0])

    def kept(self) -> list[Shards]:
        return [*super().kept(), *(part.latents for part in self.parts)]

    def left(self) -> int:
        return super().left() + sum(part.left() for part in self.parts)

    def fill(self, rank: int, world: int, barrier: Callable[[], None], on_items: Progress) -> None:
        missing = [(part, number) for part in self.parts for number in part.latents.missing()]
        super().fill(rank, world, barrier, on_items)
        if rank == 0:
            if self.images.sizes is not None:
                self.images.sizes.keep(self.folder)
            for part in self.parts:
                part.latents.begin()
        barrier()
        for part, number in missing[rank::world]:
            part.encode(number, on_items)
        self.codec.close()
        barrier()

    @cached_property
    def _shares(self) -> Tensor:
        return torch.tensor([len(part.readable) for part in self.parts], dtype=torch.float64)

    def _drawn(self, rng: torch.Generator) -> int:
        return int(torch.multinomial(self._shares, 1, generator=rng))

    def time_ids(self, indices: Tensor) -> Tensor | None:
        return self.parts[0].time_ids(indices)

    @property
    def main(self) -> Conditions:
        return self.parts[0]

    def unreadable(self) -> int:
        return sum(part.unreadable() for part in self.parts)

    def readable_images(self) -> Images:
        kept = [part.readable_images() for part in self.parts]
        return BucketedImages.of([images for images in kept if len(images)])

    def indices(self, size: int, rng: torch.Generator) -> Tensor:
        """Of all images, one bucket after the other."""
        number = self._drawn(rng)
        return self._firsts[number] + self.parts[number].indices(size, rng)

    def batch(self, size: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """A random batch of one shape: latents (B, C, H, W) float32, and what they are conditioned on."""
        number = self._drawn(rng)
        part = self.parts[number]
        x0, cond, indices = part.drawn(size, rng)
        if self.embeddings:
            cond |= self.embeddings.cond(self._firsts[number] + indices)
        return x0, part.told(cond, indices)
