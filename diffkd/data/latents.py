"""Latents of images and embeddings of their captions, computed once and kept on disk, as examples."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffkd.core.conditioning import Codec, Cond, Conditioner
from diffkd.data.images import Images
from diffkd.data.resized import MAX_UNREADABLE
from diffkd.data.shards import Shards
from diffkd.errors import UserError
from diffkd.io.text import reason

SHARD_BYTES = 1 << 26
OPEN_FILES = 64  # that are kept mapped
NULL = "null"
READABLE = "readable"
Progress = Callable[[int], None]  # called with so many more items


class LatentCache:
    """The latents of a dataset, and for a model of prompts the embeddings of its captions, in one folder.

    An image is kept as mean and standard deviation of its latents, from which the update's own generator
    draws; of a dataset that is flipped at random also those of its mirror image. Images that cannot be read
    are marked, and never drawn. Every different caption is encoded once. `fill` computes what is missing, in
    two phases, so that encoders and autoencoder never lie in memory together; then neither is needed. Raises
    UserError where the folder holds others.
    """

    def __init__(self, folder: Path, images: Images, codec: Codec, conditioner: Conditioner | None) -> None:
        self.folder, self.images, self.codec, self.conditioner = folder, images, codec, conditioner
        height, width = images.shape[1:]
        self.shape = codec.shape(height, width)
        numbers = torch.Size(self.shape).numel() * (4 if images.flip else 2)
        recipe: dict[str, Any] = {
            "codec": codec.key, "data": images.digest(), "shape": [*self.shape], "flip": images.flip,
            "in_shard": _fitting(numbers),
        }  # fmt: skip
        self.latents = Shards(folder / "latents", "latents", recipe, len(images), _fitting(numbers))
        self.embeddings: Shards | None = None
        if conditioner is not None:
            prompts = hashlib.sha256("\0".join(self.captions).encode()).hexdigest()
            numbers = sum(value.numel() for value in conditioner.example.values())
            count, size = len(self.captions), _fitting(numbers)
            recipe = {
                "conditioner": conditioner.key, "captions": prompts, "size": [height, width], "in_shard": size
            }  # fmt: skip
            self.embeddings = Shards(folder / "embeddings", "embeddings", recipe, count, size)
        self._files, self._lock = OrderedDict[Path, Any](), threading.Lock()

    @cached_property
    def captions(self) -> list[str]:
        """The different ones, in the order of their first image; an image without one has the empty one."""
        return list(dict.fromkeys(self.images.captions)) or [""]

    @cached_property
    def _caption_of(self) -> Tensor:
        """The place in `captions` of each image's."""
        place = {caption: number for number, caption in enumerate(self.captions)}
        given = self.images.captions or [""] * len(self.images)
        return torch.tensor([place[caption] for caption in given])

    def missing(self) -> tuple[list[int], list[int]]:
        """The shards of embeddings and of latents that are still to be written. A file is whole or absent."""
        found = []
        for shards in (self.embeddings, self.latents):
            numbers = [] if shards is None else range(len(shards.ranges()))
            found.append([number for number in numbers if shards and not shards.path(number).exists()])
        return found[0], found[1]

    @property
    def _has_null(self) -> bool:
        return self.embeddings is None or self.embeddings.path(NULL).exists()

    def left(self) -> int:
        """How many captions and images are still to be computed."""
        parts = zip((self.embeddings, self.latents), self.missing(), strict=True)
        shards = sum(len(shards.ranges()[n]) for shards, numbers in parts if shards for n in numbers)
        return shards + (not self._has_null)

    def fill(self, rank: int, world: int, barrier: Callable[[], None], on_items: Progress) -> None:
        """Computes what is missing, each of `world` processes its share of the files. barrier: waits for the
        others. on_items: told of every caption and image."""
        captions, latents = self.missing()
        if rank == 0:
            for shards in (self.embeddings, self.latents):
                if shards is not None:
                    shards.begin()
            if self.embeddings is not None and self.conditioner is not None and not self._has_null:
                self.embeddings.write(NULL, self.conditioner.null())
        barrier()
        if self.embeddings is not None and self.conditioner is not None:
            for number in captions[rank::world]:
                items = self.embeddings.ranges()[number]
                size = self.images.shape[1], self.images.shape[2]
                made = self.conditioner.embed(self.captions[items.start : items.stop], size)
                self.embeddings.write(number, dict(made))
                on_items(len(items))
            self.conditioner.close()
        for number in latents[rank::world]:
            items = self.latents.ranges()[number]
            parts = list(self._moments(items, on_items))
            made = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            self.latents.write(number, self._marked(made))
        self.codec.close()
        barrier()

    def _moments(self, items: range, on_items: Progress, together: int = 16) -> Iterator[dict[str, Tensor]]:
        for pixels, readable in self.images.in_turn(items, together):
            images = (pixels.float() / 127.5 - 1).expand(-1, 3, -1, -1)
            found = {READABLE: readable}
            for suffix, given in (("", images), ("_flipped", images.flip(-1)))[: 1 + self.images.flip]:
                mean, std = self.codec.moments(given)
                found |= {f"mean{suffix}": mean.cpu(), f"std{suffix}": std.cpu()}
            yield found
            on_items(len(images))

    def _marked(self, made: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file, which say what could be read where something could not."""
        readable = made.pop(READABLE)
        self._refuse_many(readable)
        return made if readable.all() else made | {READABLE: readable}

    def _refuse_many(self, readable: Tensor) -> None:
        """Raises UserError where more than one image and MAX_UNREADABLE of these cannot be read."""
        unreadable = int((~readable).sum())
        if unreadable > min(max(1, MAX_UNREADABLE * len(readable)), len(self) - 1):
            of = "" if len(readable) == len(self) else " in a row"
            raise UserError(
                f"{unreadable} of {len(readable)} images{of} of {self.images.name} cannot be read; remove or "
                "repair them, and use another cache"
            )

    @cached_property
    def readable(self) -> Tensor:
        """The indices of the images that could be read, ascending; once nothing is missing."""
        parts = []
        for number, items in enumerate(self.latents.ranges()):
            file = self._open(self.latents.path(number))
            known = READABLE in file.keys()  # noqa: SIM118
            parts.append(file.get_tensor(READABLE) if known else torch.ones(len(items), dtype=torch.bool))
        readable = torch.cat(parts)
        self._refuse_many(readable)
        return readable.nonzero()[:, 0]

    def readable_images(self) -> Images:
        """The images that could be read, once nothing is missing."""
        return self.images if len(self.readable) == len(self) else self.images.take(self.readable)

    def null(self) -> Cond:
        """What the conditioner made of no prompt; {} without one."""
        if self.embeddings is None:
            return {}
        with safe_open(self.embeddings.path(NULL), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    # as examples (`images.Examples`), once nothing is missing

    def __len__(self) -> int:
        return len(self.images)

    def indices(self, size: int, rng: torch.Generator) -> Tensor:
        """The indices of a random batch, (size,); the first numbers that `batch` draws from rng."""
        return self.readable[torch.randint(len(self.readable), (size,), generator=rng)]

    def batch(self, size: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """A random batch: latents (B, C, H, W) float32, and what they are conditioned on."""
        indices = self.indices(size, rng)
        flipped = torch.rand(size, generator=rng) < 0.5 if self.images.flip else torch.zeros(size).bool()
        suffixes = ["_flipped" if flip else "" for flip in flipped]
        mean, std = (
            torch.stack(
                [
                    self._row(self.latents, i, f"{key}{suffix}")
                    for i, suffix in zip(indices.tolist(), suffixes, strict=True)
                ]
            )
            for key in ("mean", "std")
        )
        x0 = mean + std * torch.randn(mean.shape, generator=rng)
        return x0, self.cond(indices)

    @property
    def prompts(self) -> str:
        """Digest of the captions and of what encodes them; "" for a model without prompts."""
        if self.embeddings is None:
            return ""
        total = hashlib.sha256(repr(sorted(self.embeddings.recipe.items())).encode())
        total.update(self._caption_of.numpy().tobytes())
        return total.hexdigest()

    def cond(self, indices: Tensor) -> dict[str, Tensor]:
        """What the images at these indices, modulo their number, are conditioned on."""
        indices = indices % len(self)
        cond = {} if self.images.labels is None else {"class_labels": self.images.labels[indices]}
        if self.embeddings is not None and self.conditioner is not None:
            places = self._caption_of[indices].tolist()
            for key in self.conditioner.example:
                cond[key] = torch.stack([self._row(self.embeddings, place, key) for place in places])
        return cond

    def _row(self, shards: Shards, index: int, key: str) -> Tensor:
        row: Tensor = self._open(shards.path(index // shards.in_shard)).get_slice(key)[
            index % shards.in_shard
        ]
        return row

    def _open(self, path: Path) -> Any:
        """A file, mapped. Raises UserError for one that is damaged or gone."""
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


def _fitting(numbers: int) -> int:
    """How many items of so many float32 numbers a file holds."""
    return max(1, SHARD_BYTES // (4 * max(1, numbers)))
