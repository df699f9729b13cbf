"""Latents of images, computed once and kept on disk, with what they are conditioned on, as examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from diffkd.core.conditioning import Codec, Cond, Conditioner
from diffkd.data.absent import Unseen
from diffkd.data.buckets import cropped
from diffkd.data.embeddings import Embeddings, Progress
from diffkd.data.images import Images
from diffkd.data.resized import MAX_UNREADABLE
from diffkd.data.shards import Rows, Shards, fitting, keyed
from diffkd.errors import UserError

READABLE, ORIGIN = "readable", "origin"
SURELY_MANY, FEW_UNREADABLE = 0.1, 8  # of the images of one file: more end the run before all are encoded


class Conditions(ABC):
    """What a dataset's examples are conditioned on: their prompts' embeddings, kept in a folder, for a model
    of prompts; their labels where they have any.

    The base of what a latent model learns from. shape: (C, H, W) of the latents.
    """

    def __init__(
        self, folder: Path, images: Images | Unseen, codec: Codec, conditioner: Conditioner | None
    ) -> None:
        self.folder, self.images, self.codec, self.conditioner = folder, images, codec, conditioner
        height, width = images.shape[1:]
        self.shape = codec.shape(height, width)
        self.embeddings: Embeddings | None = None
        if conditioner is not None:
            self.embeddings = Embeddings(folder, images.captions, (height, width), conditioner)

    def kept(self) -> list[Shards]:
        """All that is kept of it."""
        return [self.embeddings.shards] if self.embeddings else []

    def left(self) -> int:
        """How many prompts and images are still to be computed."""
        return self.embeddings.left() if self.embeddings else 0

    def fill(self, rank: int, world: int, barrier: Callable[[], None], on_items: Progress) -> None:
        """Computes what is missing, each of `world` processes its share of the files. barrier: waits for the
        others. on_items: told of every prompt and image."""
        prompts = self.embeddings.missing() if self.embeddings else []
        if rank == 0 and self.embeddings:
            self.embeddings.begin()
        barrier()
        if self.embeddings:
            self.embeddings.fill(prompts[rank::world], on_items)
        barrier()

    def null(self) -> Cond:
        """What the conditioner made of no prompt; {} without one."""
        return self.embeddings.null() if self.embeddings else {}

    @property
    def prompts(self) -> str:
        """Digest of the prompts and of what encodes them; "" for a model without."""
        return self.embeddings.digest if self.embeddings else ""

    def __len__(self) -> int:
        return len(self.images)

    def cond(self, indices: Tensor) -> dict[str, Tensor]:
        """What the examples at these indices, modulo their number, are conditioned on."""
        return self.told(self.asked(indices), indices % len(self))

    def asked(self, indices: Tensor) -> dict[str, Tensor]:
        """The same, of images that are drawn: as large as they are, and not cut."""
        indices, labels = indices % len(self), self.images.labels
        cond = {} if labels is None else {"class_labels": labels[indices]}
        return cond | (self.embeddings.cond(indices) if self.embeddings else {})

    def told(self, cond: dict[str, Tensor], indices: Tensor) -> dict[str, Tensor]:
        """The conditioning with the sizes of these images, where the model is told them."""
        known = self.time_ids(indices) if "time_ids" in cond else None
        return cond if known is None else cond | {"time_ids": known}

    def time_ids(self, indices: Tensor) -> Tensor | None:
        """SDXL's micro-conditioning of images, (B, 6): the size that they had, the corner of the crop, the
        size that they have (Podell et al. 2023, 2.2); None where there are no images."""
        return None

    def unreadable(self) -> int:
        """How many images could not be read, once nothing is missing."""
        return 0

    def check(self) -> None:
        """Raises UserError where these are more than one and MAX_UNREADABLE of all, or all."""
        count, unreadable = len(self.images), self.unreadable()
        if unreadable and unreadable > min(max(1, MAX_UNREADABLE * count), count - 1):
            raise UserError(
                f"{unreadable} of {count} images of {self.images.name} cannot be read; remove or repair "
                "them, and use another cache"
            )

    def readable_images(self) -> Images | Unseen:
        """The images that could be read, once nothing is missing."""
        return self.images

    @property
    def main(self) -> Conditions:
        """What is of one shape, the most frequent."""
        return self

    @abstractmethod
    def indices(self, size: int, rng: torch.Generator) -> Tensor:
        """See `images.Examples`."""

    @abstractmethod
    def batch(self, size: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """See `images.Examples`."""


class LatentCache(Conditions):
    """The latents of images and what they are conditioned on, in one folder.

    An image is kept as mean and standard deviation of its latents, from which the update's own generator
    draws; of a dataset that is flipped at random also those of its mirror image. Images that cannot be read
    are marked, and never drawn. `fill` computes what is missing, in two phases, so that encoders and
    autoencoder never lie in memory together; then neither is needed. Those of other images, prompts or
    encoders may lie in the same folder.
    """

    images: Images

    def __init__(self, folder: Path, images: Images, codec: Codec, conditioner: Conditioner | None) -> None:
        super().__init__(folder, images, codec, conditioner)
        in_shard = fitting(torch.Size(self.shape).numel() * (4 if images.flip else 2))
        recipe = {
            "codec": codec.key, "data": images.digest(), "shape": [*self.shape], "flip": images.flip
        }  # fmt: skip
        self.pixels = images.shape[1], images.shape[2]
        self.latents = keyed(folder, "latents", recipe, len(images), in_shard)
        self._rows = Rows(self.latents)

    def kept(self) -> list[Shards]:
        return [*super().kept(), self.latents]

    def left(self) -> int:
        ranges = self.latents.ranges()
        return super().left() + sum(len(ranges[number]) for number in self.latents.missing())

    def fill(self, rank: int, world: int, barrier: Callable[[], None], on_items: Progress) -> None:
        missing = self.latents.missing()
        super().fill(rank, world, barrier, on_items)
        if rank == 0:
            if self.images.listed is not None:
                self.images.listed.keep(self.folder)
            self.latents.begin()
        barrier()
        first, last = (len(missing) * part // world for part in (rank, rank + 1))
        for number in missing[first:last]:  # in a row: one process streams nothing twice
            self.encode(number, on_items)
        self.codec.close()
        barrier()

    def encode(self, number: int, on_items: Progress) -> None:
        """Writes one file."""
        parts = list(self._moments(self.latents.ranges()[number], on_items))
        made = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        self.latents.write(number, self._marked(made))

    def _moments(self, items: range, on_items: Progress, together: int = 16) -> Iterator[dict[str, Tensor]]:
        for pixels, readable, sizes in self.images.in_turn(items, together):
            images = (pixels.float() / 127.5 - 1).expand(-1, self.codec.image_channels, -1, -1)
            found = {READABLE: readable, ORIGIN: cropped(sizes, self.pixels)}
            for suffix, given in (("", images), ("_flipped", images.flip(-1)))[: 1 + self.images.flip]:
                mean, std = self.codec.moments(given)
                found |= {f"mean{suffix}": mean.cpu(), f"std{suffix}": std.cpu()}
            yield found
            on_items(len(images))

    def _marked(self, made: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file, which say what could be read where something could not."""
        readable = made.pop(READABLE)
        unreadable = int((~readable).sum())
        if unreadable > max(FEW_UNREADABLE, SURELY_MANY * len(readable)):
            raise UserError(
                f"{unreadable} of {len(readable)} images in a row of {self.images.name} cannot be read; "
                "remove or repair them"
            )
        return made if readable.all() else made | {READABLE: readable}

    @cached_property
    def readable(self) -> Tensor:
        """The indices of the images that could be read, ascending; once nothing is missing."""
        parts = []
        for number, items in enumerate(self.latents.ranges()):
            known = self._rows.whole(number, READABLE)
            parts.append(torch.ones(len(items), dtype=torch.bool) if known is None else known)
        return torch.cat(parts).nonzero()[:, 0]

    def unreadable(self) -> int:
        return len(self) - len(self.readable)

    def readable_images(self) -> Images:
        """The images that could be read, once nothing is missing."""
        return self.images if len(self.readable) == len(self) else self.images.take(self.readable)

    # as examples (`images.Examples`), once nothing is missing

    def indices(self, size: int, rng: torch.Generator) -> Tensor:
        """The indices of a random batch, (size,); the first numbers that `batch` draws from rng."""
        return self.readable[torch.randint(len(self.readable), (size,), generator=rng)]

    def time_ids(self, indices: Tensor) -> Tensor:
        origins = torch.stack([self._rows(i, ORIGIN) for i in indices.tolist()])
        return torch.cat([origins, torch.tensor([self.pixels]).expand(len(indices), 2)], 1)

    def batch(self, size: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """A random batch: latents (B, C, H, W) float32, and what they are conditioned on."""
        x0, cond, _ = self.drawn(size, rng)
        return x0, cond

    def drawn(self, size: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """`batch`, and the indices of its images."""
        indices = self.indices(size, rng)
        flipped = torch.rand(size, generator=rng) < 0.5 if self.images.flip else torch.zeros(size).bool()
        suffixes = ["_flipped" if flip else "" for flip in flipped]
        mean, std = (
            torch.stack(
                [
                    self._rows(i, f"{key}{suffix}")
                    for i, suffix in zip(indices.tolist(), suffixes, strict=True)
                ]
            )
            for key in ("mean", "std")
        )
        x0 = mean + std * torch.randn(mean.shape, generator=rng)
        return x0, self.cond(indices), indices


class UnseenLatents(Conditions):
    """Prompts or labels alone, as examples of a latent model that learns from its teacher."""

    images: Unseen

    def __len__(self) -> int:
        return len(self.images.captions) or 1

    def indices(self, size: int, rng: torch.Generator) -> Tensor:
        """The indices of the prompts of a random batch; of labels, places in the batch."""
        return torch.randint(len(self), (size,), generator=rng) if self.embeddings else torch.arange(size)

    def batch(self, size: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """x0 of the right shape, NaN so that no method can learn from it unnoticed, and random conditions."""
        x0 = torch.full((size, *self.shape), torch.nan)
        if self.embeddings is None:
            return x0, self.images.batch(size, rng)[1]
        return x0, self.cond(self.indices(size, rng))
