"""Images that are decoded when they are asked for: a model of latents reads each once, to encode it."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffkd.data.decoding import upright_size
from diffkd.errors import UserError
from diffkd.io.text import log, reason

TOGETHER = 4096  # files whose heads are read at once
Used = TypeVar("Used")


@dataclass(frozen=True)
class OnDemand:
    """What stands for the array (N, C, H, W) uint8 of `Images`, indexed by slices and arrays of indices.

    files: the number of each image's file, (N,). each: (C, H, W). open_one, name_of: open and name the file
    of a number. to_pixels: makes an opened image, given its name, (C, H, W) uint8. fingerprint: what tells
    these images from others without reading them. fetch: called with the numbers of files before these are
    opened, where they have to be brought first.
    """

    files: np.ndarray
    each: tuple[int, int, int]
    open_one: Callable[[int], Image.Image]
    name_of: Callable[[int], str]
    to_pixels: Callable[[Image.Image, str], np.ndarray]
    fingerprint: str
    fetch: Callable[[list[int]], None] | None = None

    dtype = np.dtype(np.uint8)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), *self.each

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """(B, C, H, W) uint8. Raises UserError where one of them cannot be read."""
        pixels, readable, _ = self.read(rows)
        if not readable.all():
            name = self.name_of(int(self.files[rows][~readable][0]))
            raise UserError(f"image {name} cannot be read (see above); repair it, or take it out")
        return pixels

    def read(self, rows: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(B, C, H, W) uint8; which of them are images, (B,) bool; and the height and width that these had,
        (B, 2). The others are black, with a warning.

        Raises UserError for a file that the system does not give, since it may be there again later.
        """
        files = self.files[rows]
        pixels, readable = np.zeros((len(files), *self.each), np.uint8), np.ones(len(files), bool)
        sizes = np.full((len(files), 2), self.each[1:])
        if self.fetch is not None:
            self.fetch(files.tolist())
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for place, found in enumerate(pool.map(self._decoded, files.tolist())):
                if isinstance(found, str):
                    log.warning("unreadable image: %s (%s)", self.name_of(int(files[place])), found)
                    readable[place] = False
                else:
                    pixels[place], sizes[place] = found
        return pixels, readable, sizes

    def sizes(self) -> Tensor:
        """Height and width of each image, (N, 2), by the head of its file; of one that is no image those that
        images are given. Raises UserError as `read`."""
        found = torch.tensor([self.each[1:]]).repeat(len(self), 1)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(self), TOGETHER):
                files = self.files[start : start + TOGETHER].tolist()
                for place, size in enumerate(pool.map(self._size, files), start):
                    if not isinstance(size, str):
                        found[place] = torch.tensor(size)
        return found

    def take(self, indices: np.ndarray) -> OnDemand:
        """The images at these indices alone."""
        return replace(self, files=self.files[indices])

    def _decoded(self, file: int) -> tuple[np.ndarray, tuple[int, int]] | str:
        """The pixels and the size that they had, or what is wrong with the file."""

        def decoded(opened: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
            pixels = self.to_pixels(opened, self.name_of(file))
            return pixels, upright_size(opened)  # of what stands behind the pixels of a PNG too

        return self._used(file, decoded)

    def _size(self, file: int) -> tuple[int, int] | str:
        return self._used(file, upright_size)

    def _used(self, file: int, use: Callable[[Image.Image], Used]) -> Used | str:
        """What is made of an opened image, or what is wrong with its file."""
        try:
            with self.open_one(file) as opened:
                return use(opened)
        except UserError:
            raise
        except Exception as error:  # Pillow raises many types for broken files
            if isinstance(error, OSError) and error.errno is not None:
                raise UserError(
                    f"image {self.name_of(file)} cannot be read ({error.strerror}); bring it back, and the "
                    "same command goes on"
                ) from error
            return reason(error)
