"""Datasets of images of any size: their config, decoding, resizing and cropping."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field, model_validator
from typing_extensions import Self

from diffkd.data.buckets import BucketedImages, Shape, Sizes, bucket_shapes, nearest
from diffkd.data.decoding import fitted, upright
from diffkd.data.images import Images
from diffkd.data.on_demand import OnDemand
from diffkd.errors import UserError
from diffkd.io.config import Strict
from diffkd.io.naming import called, option
from diffkd.io.text import log, reason

MAX_UNREADABLE = 0.01  # a larger share of unreadable files stops the run
MAX_IN_MEMORY = 4 << 30  # bytes of pixels beyond which they are mapped from a temporary file


LARGEST_SIDE = 16_384  # pixels of a height or width that images can be brought to


class ResizedDataset(Strict):
    """Config shared by datasets whose images are resized and cropped to one shape."""

    size: int = Field(
        ge=1,
        le=LARGEST_SIDE,
        description="height and width, by resizing the short side and cropping the centre",
    )
    channels: Literal[1, 3] = Field(3, description="1 is grey, 3 is RGB")
    upscale: bool = Field(False, description="whether smaller images may be enlarged")
    flip: bool = Field(False, description="flip left to right at random in training")
    buckets: int | None = Field(
        None,
        ge=1,
        description="for models of latents: each image in the shape nearest to its own, of at most "
        "size x size pixels and with sides that are multiples of this; default all square",
    )
    labelled: bool = Field(True, description="whether to use class labels where there are any")

    @model_validator(mode="after")
    def _square_at_least(self) -> Self:
        if self.buckets is not None and self.buckets > self.size:
            raise ValueError(f"buckets {self.buckets} is more than size {self.size}; use a part of it")
        return self

    def to_pixels(self, opened: Image.Image, name: str, shape: Shape | None = None) -> np.ndarray:
        """One image as (C, H, W) uint8: turned upright, resized (bicubic, antialiased), centre-cropped.
        shape: height and width; default the dataset's size."""
        image = upright(opened, self.channels)
        height, width = shape or (self.size, self.size)
        if (image.height < height or image.width < width) and not self.upscale:
            of = "" if shape is None else f" (here {width}x{height})"
            raise UserError(
                f"{name} is {image.width}x{image.height}, smaller than {called('data.size')} {self.size}{of};"
                f" use a smaller size{option(', or set {}: true', 'data.upscale')}"
            )
        pixels = np.asarray(fitted(image, height, width))
        return pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)

    def decode_all(
        self, name: str, count: int, open_one: Callable[[int], Image.Image], name_of: Callable[[int], str]
    ) -> tuple[np.ndarray, list[int]]:
        """Pixels of the readable images, and their indices; unreadable ones are logged and skipped.

        name: of the dataset. open_one, name_of: open and name the image of an index. Raises UserError where
        more than MAX_UNREADABLE of them are unreadable.
        """

        def decode(index: int) -> np.ndarray | None:
            try:
                with open_one(index) as opened:
                    return self.to_pixels(opened, name_of(index))
            except UserError:
                raise
            except Exception as error:  # Pillow raises many types for broken files
                log.warning("unreadable image skipped: %s (%s)", name_of(index), reason(error))
                return None

        if self.buckets is not None:
            raise UserError(
                f"{called('data.buckets')} {self.buckets} is for models of latents, and pixels are of one "
                "size; leave it out"
            )
        pixels = _allocate((count, self.channels, self.size, self.size))
        readable: list[int] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for index, image in enumerate(pool.map(decode, range(count))):
                if image is not None:
                    pixels[len(readable)] = image
                    readable.append(index)
        unreadable = count - len(readable)
        if unreadable > MAX_UNREADABLE * count:
            raise UserError(
                f"{unreadable} of {count} images in {name} cannot be read (see above); remove or repair them"
            )
        return pixels[: len(readable)], readable

    def on_demand(
        self,
        count: int,
        open_one: Callable[[int], Image.Image],
        name_of: Callable[[int], str],
        fingerprint: str,
        made_of: Callable[[OnDemand], Images],
        kept: Path | None,
        fetch: Callable[[list[int]], None] | None = None,
    ) -> Images:
        """`count` images, decoded when they are asked for, in buckets where the config has them.

        open_one, name_of: open and name the image of an index. fingerprint: of the files. made_of: adds to
        the pixels all else that is known of the images. kept: where their sizes may be, of an earlier run.
        fetch: as `OnDemand` has it.
        """

        def of(shape: Shape | None) -> OnDemand:
            each = (self.channels, *(shape or (self.size, self.size)))
            to_pixels, made = partial(self.to_pixels, shape=shape), f"{fingerprint} {self.upscale} {shape}"
            return OnDemand(np.arange(count), each, open_one, name_of, to_pixels, made, fetch)

        if self.buckets is None:
            return made_of(of(None))
        among = bucket_shapes(self.size, self.buckets)
        sizes = Sizes.of(of(None), fingerprint, kept)
        chosen = nearest(sizes.values, among)
        parts = [
            made_of(of(shape)).take((chosen == place).nonzero()[:, 0]) for place, shape in enumerate(among)
        ]
        return BucketedImages.of([part for part in parts if len(part)], sizes)


def _allocate(shape: Sequence[int]) -> np.ndarray:
    """An array for pixels: in memory, or beyond MAX_IN_MEMORY mapped from a temporary file."""
    if int(np.prod(shape)) <= MAX_IN_MEMORY:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile() as file:  # the mapping keeps the file alive
        return np.memmap(file, np.uint8, "w+", shape=tuple(shape))
