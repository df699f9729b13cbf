"""Images that are given in Python, as arrays, tensors or PIL images, rather than by the name of a set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from diffkd.errors import UserError
from diffkd.io.config import Strict
from diffkd.io.text import counted, quoted
from diffkd.metrics.evaluation.image_sources import ArraySource

Given = np.ndarray | torch.Tensor | Iterable[Any]  # an array of images, or what yields images or batches
NAME = "images in memory"
CHANNELS = (1, 3)


class InMemory(Strict):
    """What a protocol says of where such images are: nowhere, so that they cannot be measured again."""

    kind: Literal["memory"] = "memory"


def source_of(given: Any) -> ArraySource:
    """A set of images from an array or a tensor (N, ...), or from anything that yields images or batches of
    them, which is read to its end and kept.

    Values are uint8, or float in [0, 1], which is rounded. Colours are the last axis, or the first of an
    image, of size 1 or 3. Raises UserError for anything else, for images of several shapes, and for fewer
    than 2.
    """
    if isinstance(given, np.ndarray | torch.Tensor | Image.Image) or not isinstance(given, Iterable):
        given = [given]
    parts = list(_batches(given))
    shapes = {part.shape[1:]: None for part in parts}
    if len(shapes) > 1:
        one, two = list(shapes)[:2]
        raise UserError(
            f"the images are of several shapes ({_size(one)} and {_size(two)}, height x width x channels); "
            "bring them to one"
        )
    count = sum(map(len, parts))
    if count < 2:
        raise UserError(
            f"{counted(count, 'image')} {'is' if count == 1 else 'are'} given; a covariance needs at least 2"
        )
    return ArraySource(Path(NAME), {"arr_0": np.concatenate(parts)})


def _batches(given: Iterable[Any]) -> Iterator[np.ndarray]:
    """uint8 (B, H, W, C) each."""
    for one in given:
        if isinstance(one, Image.Image):
            array = np.asarray(one if one.mode == "L" else one.convert("RGB"))
        elif isinstance(one, torch.Tensor):
            one = one.detach().cpu()
            array = (one.float() if one.is_floating_point() else one).numpy()
        elif isinstance(one, np.ndarray):
            array = one
        else:
            raise UserError(
                f"{quoted(one)} is no image; give arrays, tensors or PIL images, or the name of a folder, an "
                ".npz, a data set or a model"
            )
        yield _colours_last(_to_uint8(array))


def _to_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f":
        raise UserError(f"images of {array.dtype} are given; give uint8, or float in [0, 1]")
    if not np.isfinite(array).all():
        raise UserError("images with NaN or infinite values are given; find out where they come from")
    if array.size and not (array.min() >= 0 and array.max() <= 1):
        raise UserError(
            f"float images with values from {array.min():.3g} to {array.max():.3g} are given; give values in "
            "[0, 1], such as (x + 1) / 2 of those in [-1, 1], clipped"
        )
    return np.rint(array * 255).astype(np.uint8)


def _colours_last(array: np.ndarray) -> np.ndarray:
    """(B, H, W, C) of (B, H, W, C), (B, C, H, W), or one image with its axes, a grey one perhaps with two."""
    batch = array[None, ..., None] if array.ndim == 2 else array[None] if array.ndim == 3 else array
    if batch.ndim == 4 and 0 not in batch.shape[1:]:
        first, last = (batch.shape[axis] in CHANNELS for axis in (1, 3))
        if first != last:
            return np.ascontiguousarray(batch if last else batch.transpose(0, 2, 3, 1))
    raise UserError(
        f"images of shape {array.shape} are given; give (N, H, W, C) or (N, C, H, W) with 1 or 3 channels"
    )


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
