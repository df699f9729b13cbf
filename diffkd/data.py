"""Images and labels, from scikit-learn's digits, a folder of images, or a Hugging Face data set."""

from __future__ import annotations

import copy
import hashlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field
from torch import Tensor

from diffkd.base import Strict, UserError
from diffkd.text import reason

log = logging.getLogger("diffkd")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
# A file is opened as what it is, whatever its name says, if it is one of these: Pillow knows formats that run
# other programs (PostScript) or read other files.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF")
MAX_UNREADABLE = 0.01  # more of the files than this and the run stops
DIGESTED = 20_000
IN_MEMORY = 4 << 30  # bytes of pixels beyond which they lie in a temporary file, mapped
# Threads decode, and would print these over each other. `upright` refuses what the first warns of; the others
# tell of metadata that nobody reads. Whoever has filters of his own keeps them.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, append=True)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.", append=True)


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


class Digits(Strict):
    """scikit-learn's 1,797 handwritten digits, 8x8 grey (extra `digits`)."""

    kind: Literal["digits"]

    def load(self) -> Images:
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise UserError(
                "data kind digits needs scikit-learn; install it with pip install 'diffkd[digits]'"
            ) from error
        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
        return Images("digits", pixels, torch.from_numpy(digits.target).long(), [str(d) for d in range(10)])


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


class Folder(Sized):
    """A folder of images (PNG, JPEG, WebP, ...); its subfolders, where it has any, are the classes."""

    kind: Literal["folder"]
    path: Path = Field(description="the folder")

    def load(self) -> Images:
        root = self.path.expanduser()
        if not os.path.isdir(root):
            raise UserError(f"data.path {root} is no folder; give a folder of images")
        classes = sorted(
            d.name for d in root.iterdir() if d.is_dir() and next(image_files(d), None) is not None
        )
        loose = [p for p in root.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file()]
        if classes and loose:
            raise UserError(
                f"{root} holds both images and class folders ({classes[0]}, ...); keep one of the two"
            )
        paths = [p for c in classes for p in sorted(image_files(root / c))] or sorted(loose)
        if not paths:
            raise UserError(
                f"{root} holds no images ({', '.join(SUFFIXES)}), neither itself nor in subfolders"
            )
        pixels, good = self.read_all(
            str(root), len(paths), lambda i: open_image(paths[i]), lambda i: str(paths[i])
        )
        labels = None
        if classes and self.labelled:
            number = {name: n for n, name in enumerate(classes)}
            labels = torch.tensor([number[paths[i].relative_to(root).parts[0]] for i in good])
        return Images(str(self.path), pixels, labels, classes if labels is not None else [], self.flip)


class HubDataset(Sized):
    """A Hugging Face data set, by name or by the path of a saved one (extra `datasets`)."""

    kind: Literal["datasets"]
    path: str = Field(description="name on the hub, or a folder written by save_to_disk")
    subset: str | None = Field(None, description="configuration of a data set that has several")
    split: str = Field("train", description="which split")
    image: str | None = Field(None, description="column of images; default the first of that type")
    label: str | None = Field(None, description="column of labels; default the first of type ClassLabel")

    def load(self) -> Images:
        rows = self._rows()
        image = self._column(rows.features, self.image, "image column", "Image")
        if image is None:
            raise UserError(f"data set {self.path} has no image column; it has {', '.join(rows.features)}")
        label = (
            self._column(rows.features, self.label, "column", "ClassLabel", "Value")
            if self.labelled
            else None
        )
        stored = self._stored(rows, image)
        pixels, good = self.read_all(
            self.path, len(rows), lambda i: _opened(stored[i][image]), lambda i: f"{self.path}[{i}]"
        )
        if not good:
            raise UserError(f"data set {self.path} (split {self.split}) holds no images")
        if label is None:
            return Images(self.path, pixels, flip=self.flip)
        values = [int(v) for v in rows[label]]
        if min(values) < 0:
            raise UserError(
                f"data set {self.path} has label {min(values)} in row {values.index(min(values))}, no class; "
                "use a split with labels, or set data.labelled: false"
            )
        classes = list(getattr(rows.features[label], "names", None) or map(str, range(max(values) + 1)))
        return Images(self.path, pixels, torch.tensor([values[i] for i in good]), classes, self.flip)

    def _stored(self, rows: Any, image: str) -> Any:
        """The rows with their images as files, to be opened as all others are."""
        feature = copy.copy(rows.features[image])
        feature.decode = False
        return rows.select_columns([image]).cast_column(image, feature)

    def _column(self, features: Any, name: str | None, what: str, *kinds: str) -> str | None:
        """The column asked for, or the first of the first kind; None where there is none."""
        if name is None:
            return next((n for n, feature in features.items() if type(feature).__name__ == kinds[0]), None)
        if name not in features:
            raise UserError(f"data set {self.path} has no {what} {name!r}; it has {', '.join(features)}")
        kind = type(features[name]).__name__
        if kind not in kinds or (kind == "Value" and "int" not in features[name].dtype):
            raise UserError(
                f"data set {self.path} has no {kinds[0]} in column {name!r}; it has {', '.join(features)}"
            )
        return name

    def _rows(self) -> Any:
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise UserError(
                "data kind datasets needs the datasets package; pip install 'diffkd[datasets]'"
            ) from error
        try:
            if os.path.isfile(Path(self.path) / "dataset_dict.json"):
                splits = datasets.load_from_disk(self.path)
                if self.split not in splits:
                    raise ValueError(f"it has {', '.join(splits)}")
                return splits[self.split]
            if os.path.isfile(Path(self.path) / "state.json"):
                return datasets.load_from_disk(self.path)
            return datasets.load_dataset(self.path, self.subset, split=self.split)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"data set {self.path} (split {self.split}) cannot be read: {reason(error)}"
            ) from error


Data = Annotated[Digits | Folder | HubDataset, Field(discriminator="kind")]


def open_image(file: Path | IO[bytes]) -> Image.Image:
    """An image file, its pixels not read yet. Raises what Pillow does, and OSError for formats not read."""
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise OSError(f"it is no whole {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file") from error


def upright(opened: Image.Image, channels: int) -> Image.Image:
    """The first frame of an image, turned as its EXIF says, as 8-bit grey (1 channel) or RGB (3).

    Raises ValueError for more pixels than Pillow's limit and for what `plain` refuses.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and opened.width * opened.height > limit:
        raise ValueError(
            f"{opened.width}x{opened.height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS, {limit}"
        )
    opened.load()
    return plain(ImageOps.exif_transpose(opened), channels)


def plain(image: Image.Image, channels: int) -> Image.Image:
    """An image of any mode as 8-bit grey (1 channel) or RGB (3), as `convert` makes it: alpha is dropped.

    16-bit grey is scaled to 8 bits. Raises ValueError for floating-point and 32-bit pixels: which of them is
    white, no file says.
    """
    if image.mode.startswith("I"):  # 16-bit grey; convert() would clip it to white
        values = np.asarray(image).astype(np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels have more than 16 bits, and which is white is not known")
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, and which is white is not known")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "LAB":
        image = image.convert("RGB")  # Pillow knows no other way to grey
    return image.convert("L" if channels == 1 else "RGB")


def fitted(image: Image.Image, size: int) -> Image.Image:
    """size x size: the short side resized (bicubic, antialiased), the centre kept."""
    return (
        image if image.size == (size, size) else ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    )


def _opened(stored: Mapping[str, Any]) -> Image.Image:
    """The image of a data set's row: bytes, or the path of a file."""
    return open_image(Path(stored["path"]) if stored["bytes"] is None else io.BytesIO(stored["bytes"]))


def image_files(folder: Path) -> Iterator[Path]:
    return (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def _allocate(shape: Sequence[int]) -> np.ndarray:
    """Room for the pixels: memory, or beyond IN_MEMORY a file that goes when the process does."""
    if int(np.prod(shape)) <= IN_MEMORY:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile() as file:  # the mapping keeps it
        return np.memmap(file, np.uint8, "w+", shape=tuple(shape))
