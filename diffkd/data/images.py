"""Images in memory with their labels, and what images of any size are turned into."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from diffkd.data.decoding import fitted, upright
from diffkd.errors import UserError
from diffkd.io.config import Strict
from diffkd.io.text import log, reason

MAX_UNREADABLE = 0.01  # more of the files than this and the run stops
DIGESTED = 20_000
IN_MEMORY = 4 << 30  # bytes of pixels beyond which they lie in a temporary file, mapped


@dataclass(frozen=True)
class Images:
    """pixels: (N, C, H, W) uint8. labels: (N,) int64 or None. classes: names. flip: at random in training."""

    name: str
    pixels: np.ndarray
    labels: Tensor | None = None
    classes: list[str] = field(default_factory=list)
    flip: bool = False

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
        """How many images each class has; none where there are no labels."""
        return (
            [] if self.labels is None else torch.bincount(self.labels, minlength=len(self.classes)).tolist()
        )

    def digest(self) -> str:
        """What identifies them: sha256 of shape, classes, labels, and at most DIGESTED spaced images."""
        every = -(-len(self) // DIGESTED)
        total = hashlib.sha256(f"{self.pixels.shape} {self.classes} ".encode())
        total.update(b"" if self.labels is None else self.labels.numpy().tobytes())
        total.update(np.ascontiguousarray(self.pixels[::every]).tobytes())
        return total.hexdigest()

    def uint8(self, indices: Tensor | slice) -> Tensor:
        """Those images as they are, (B, C, H, W) uint8."""
        chosen = indices if isinstance(indices, slice) else indices.numpy()
        return torch.from_numpy(np.ascontiguousarray(self.pixels[chosen]))

    def indices(self, size: int, rng: torch.Generator) -> Tensor:
        """Of a random batch, (size,): the first that is drawn from its generator."""
        return torch.randint(len(self), (size,), generator=rng)

    def batch(self, size: int, rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """A random batch: x0 (B, C, H, W) float32 in [-1, 1] and labels; depends on rng alone."""
        indices = self.indices(size, rng)
        x0 = self.uint8(indices).float() / 127.5 - 1
        if self.flip:
            flipped = torch.rand(size, generator=rng) < 0.5
            x0[flipped] = x0[flipped].flip(-1)
        return x0, None if self.labels is None else self.labels[indices]


class Sized(Strict):
    """What images of any size are turned into."""

    size: int = Field(
        ge=1, description="height and width, by resizing the short side and cropping the centre"
    )
    channels: Literal[1, 3] = Field(3, description="1 is grey, 3 is RGB")
    upscale: bool = Field(False, description="whether smaller images may be enlarged")
    flip: bool = Field(False, description="flip left to right at random in training")
    labelled: bool = Field(True, description="whether to use class labels where there are any")

    def read(self, opened: Image.Image, name: str) -> np.ndarray:
        """(C, H, W) uint8 of one image: turned upright, resized (bicubic, antialiased), centre-cropped."""
        image = upright(opened, self.channels)
        if min(image.size) < self.size and not self.upscale:
            raise UserError(
                f"{name} is {image.width}x{image.height}, smaller than data.size {self.size}; "
                "use a smaller size, or set data.upscale: true"
            )
        pixels = np.asarray(fitted(image, self.size))
        return pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)

    def read_all(
        self, name: str, count: int, open_one: Callable[[int], Image.Image], name_of: Callable[[int], str]
    ) -> tuple[np.ndarray, list[int]]:
        """Pixels of all readable images and their indices; unreadable ones are named and skipped."""

        def one(index: int) -> np.ndarray | None:
            try:
                with open_one(index) as opened:
                    return self.read(opened, name_of(index))
            except UserError:
                raise
            except Exception as error:  # Pillow raises many kinds for a broken file; each means: unreadable
                log.warning("unreadable image skipped: %s (%s)", name_of(index), reason(error))
                return None

        pixels = _allocate((count, self.channels, self.size, self.size))
        good: list[int] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for index, image in enumerate(pool.map(one, range(count))):
                if image is not None:
                    pixels[len(good)] = image
                    good.append(index)
        bad = count - len(good)
        if bad > MAX_UNREADABLE * count:
            raise UserError(
                f"{bad} of {count} images in {name} cannot be read (named above); remove or repair them"
            )
        return pixels[: len(good)], good


def _allocate(shape: Sequence[int]) -> np.ndarray:
    """Room for the pixels: memory, or beyond IN_MEMORY a file that goes when the process does."""
    if int(np.prod(shape)) <= IN_MEMORY:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile() as file:  # the mapping keeps it
        return np.memmap(file, np.uint8, "w+", shape=tuple(shape))
