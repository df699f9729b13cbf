"""Sets of images opened: read batch by batch from memory, an .npz, or a folder."""

from __future__ import annotations

import copy
import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffkd.data.decoding import fitted, open_image, plain, upright, upright_size
from diffkd.data.folder import passed_over
from diffkd.data.images import Images
from diffkd.data.listing import list_folder
from diffkd.data.on_demand import OnDemand
from diffkd.errors import UserError
from diffkd.io.files import sha256
from diffkd.io.naming import called
from diffkd.io.text import reason

WORKERS = 8  # threads that decode images
SUBSET_SEED = 0


class Source(Protocol):
    """Images 0 to len - 1 in a fixed order, uint8 (H, W, C), with class labels (N,) where there are any.

    classes: their names, where they are known. size: width and height, None where images have their own.
    notes: what a reader of the numbers must know of how the images were found.
    """

    name: str
    labels: Tensor | None
    classes: Sequence[str]
    notes: Sequence[str]

    @property
    def size(self) -> tuple[int, int] | None: ...

    def __len__(self) -> int: ...

    def content(self) -> str:
        """sha256 of all that the images are made of; read in a fraction of the time that features take."""

    def read(self, start: int, stop: int) -> Tensor:
        """Images start to stop - 1, (B, H, W, C) uint8, which are of one size."""


class DataSource:
    """Images of a run's data, as training reads them."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self.name, self.labels = images.name, images.labels
        self.classes: Sequence[str] = images.classes
        self.captions = images.captions
        self.size = images.shape[2], images.shape[1]
        self.notes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.images)

    def content(self) -> str:
        return _array_digest(self.images.pixels)

    def read(self, start: int, stop: int) -> Tensor:
        return self.images.uint8(slice(start, stop)).permute(0, 2, 3, 1)


class ArraySource:
    """The images of an .npz, as ADM and `diffkd sample` write it."""

    def __init__(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
        self.name = str(path)
        if "arr_0" not in arrays:
            raise UserError(f"{path} holds no images (arr_0); it has {', '.join(arrays) or 'nothing'}")
        images = arrays["arr_0"]
        if images.dtype.kind == "f" and not np.isfinite(images).all():
            raise UserError(f"{path} has images with NaN or infinite values; find out where they come from")
        if (
            images.dtype != np.uint8
            or images.ndim != 4
            or images.shape[-1] not in (1, 3)
            or 0 in images.shape[1:]
        ):
            raise UserError(
                f"{path}: arr_0 is {images.dtype} of shape {images.shape}; "
                "images are uint8 of shape (N, H, W, 1 or 3)"
            )
        self.labels = labels_in(arrays, len(images), path)
        self.classes: Sequence[str] = ()
        self.images = images
        self.size = images.shape[2], images.shape[1]
        self.notes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.images)

    def content(self) -> str:
        return _array_digest(self.images)

    def read(self, start: int, stop: int) -> Tensor:
        return torch.from_numpy(self.images[start:stop])


def labels_in(arrays: dict[str, np.ndarray], count: int, path: Path) -> Tensor | None:
    """The class labels of an .npz: `labels`, or `arr_1` as ADM names them. Raises UserError for others."""
    for name in ("labels", "arr_1"):
        if name in arrays:
            labels = arrays[name]
            if labels.dtype.kind not in "iu" or labels.shape != (count,) or labels.size and labels.min() < 0:
                raise UserError(
                    f"{path}: {name} is {labels.dtype} of shape {labels.shape}; labels are whole numbers "
                    f"from 0, of shape ({count},)"
                )
            return torch.from_numpy(labels.astype(np.int64))
    return None


class FolderSource:
    """A folder of images, always read as RGB, turned upright or, on request, as `decoding.plain` leaves them.
    All of one size, or resized to one; as they are stored they may have sizes of their own."""

    def __init__(self, root: Path, resize: int | None, *, as_stored: bool = False) -> None:
        self.name, self.resize, self.as_stored = str(root), resize, as_stored
        found = list_folder(root)
        self.paths: Sequence[Path] = found.paths
        self.labels = None if found.labels is None else torch.tensor(found.labels)
        self.classes: Sequence[str] = found.classes
        self.notes: Sequence[str] = [passed_over(root, found.passed_over)] if found.passed_over else []
        self.pool = ThreadPoolExecutor(WORKERS)
        sizes: dict[tuple[int, int], Path] = {}
        for path, size in zip(self.paths, self.pool.map(self._size, self.paths), strict=True):
            sizes.setdefault(size, path)
        self.size: tuple[int, int] | None = next(iter(sizes)) if resize is None else (resize, resize)
        if len(sizes) > 1 and resize is None and as_stored:
            self.size = None
            self.notes = [*self.notes, f"{root} holds images of {len(sizes)} sizes, each resized on its own"]
        elif len(sizes) > 1 and resize is None:
            (one, path), (two, other) = list(sizes.items())[:2]
            raise UserError(
                f"{root} holds images of different sizes ({path.relative_to(root)} is {one[0]}x{one[1]}, "
                f"{other.relative_to(root)} {two[0]}x{two[1]}); say "
                f"{called('evaluation.reference.resize')} to bring them to one"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def content(self) -> str:
        digests = self.pool.map(_file_digest, self.paths)
        how = f"{self.resize} as stored" if self.as_stored else str(self.resize)
        return hashlib.sha256(f"{how} {' '.join(digests)}".encode()).hexdigest()

    def read(self, start: int, stop: int) -> Tensor:
        (images,) = self.runs(start, stop)
        return images

    def runs(self, start: int, stop: int) -> list[Tensor]:
        """The same, in a tensor for each run of images of one size."""
        images = self.pool.map(self._one, self.paths[start:stop])
        runs = groupby(images, key=lambda image: image.shape)
        return [torch.from_numpy(np.stack([*run])) for _, run in runs]

    def _one(self, path: Path) -> np.ndarray:
        try:
            with open_image(path) as opened:
                image = plain(opened) if self.as_stored else upright(opened, 3)
        except Exception as error:  # Pillow raises many kinds for a broken file
            raise _unreadable(path, error) from error
        if self.resize is not None:
            return np.asarray(fitted(image, self.resize, self.resize))
        # one may be rotated by EXIF data that stands behind the pixels
        if self.size is not None and image.size != self.size:
            raise UserError(
                f"image {path} is {image.width}x{image.height} and others are "
                f"{self.size[0]}x{self.size[1]}; say {called('evaluation.reference.resize')} to bring them "
                "to one size"
            )
        return np.asarray(image)

    def _size(self, path: Path) -> tuple[int, int]:
        """Width and height, when upright unless as stored."""
        try:
            with open_image(path) as image:
                if self.as_stored:
                    return image.size
                height, width = upright_size(image)
        except Exception as error:
            raise _unreadable(path, error) from error
        return width, height


def _file_digest(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _array_digest(array: np.ndarray | OnDemand) -> str:
    total = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    for start in range(0, len(array), 64):
        total.update(array[start : start + 64].tobytes())
    return total.hexdigest()


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"image {path} cannot be read ({reason(error)}); repair it, or take it out")


def subset(total: int, count: int) -> Tensor:
    """`count` indices of `total`: where they are fewer a fixed random choice in order, else all in turn.

    Images and labels often come class by class, so that the first ones are of the first classes, or the
    classes in turn, so that evenly spaced ones may all be of one.
    """
    if count < total:
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(SUBSET_SEED))[:count]
        return chosen.sort().values
    return torch.arange(count) % total


def thinned(source: Source, count: int) -> Source:
    """That many of its images, by `subset`."""
    if count == len(source):
        return source
    chosen = subset(len(source), count)
    thin = copy.copy(source)
    thin.labels = None if source.labels is None else source.labels[chosen]
    if isinstance(thin, FolderSource):
        thin.paths = [thin.paths[i] for i in chosen]
    elif isinstance(thin, ArraySource):
        thin.images = thin.images[chosen.numpy()]
    elif isinstance(thin, DataSource):
        thin.images = thin.images.take(chosen)
    return thin


def batches(
    source: Source, count: int, size: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """(index of the first, (B, H, W, C) uint8) of each batch of this process; the next one is read ahead.
    size: of a batch, which images of several sizes make several of."""

    def read(start: int, stop: int) -> list[Tensor]:
        if isinstance(source, FolderSource) and source.size is None:
            return source.runs(start, stop)
        return [source.read(start, stop)]

    def numbered(first: int, runs: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
        for run in runs:
            yield first, run
            first += len(run)

    with ThreadPoolExecutor(1) as reader:
        waiting: deque[tuple[int, Future[list[Tensor]]]] = deque()
        for start in range(rank * size, count, world * size):
            waiting.append((start, reader.submit(read, start, min(start + size, count))))
            if len(waiting) > 1:
                first, batch = waiting.popleft()
                yield from numbered(first, batch.result())
        for first, batch in waiting:
            yield from numbered(first, batch.result())
