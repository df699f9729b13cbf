"""Sets of images as users name them, on the command line or in a config."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from diffkd.data.digits import Digits
from diffkd.data.folder import Folder
from diffkd.data.hub import HubDataset
from diffkd.data.resized import LARGEST_SIDE
from diffkd.data.shapes import HELD_OUT, Shapes
from diffkd.errors import UserError
from diffkd.io.config import Strict
from diffkd.io.naming import called, in_config
from diffkd.io.npz import PICKLES, read_npz
from diffkd.io.places import expanded
from diffkd.metrics.evaluation.image_sources import ArraySource, DataSource, FolderSource, Source

SETS = ("digits", "shapes")  # that need no file
NAMED = "digits, shapes, an .npz, a folder, or a data set"
SHAPES = 2000  # held-out pictures that the name alone means


class ImageFolder(Strict):
    """A folder of images as they are: any one size, or as other tools decode them any sizes; subfolders
    included, in the order of their names."""

    kind: Literal["images"] = "images"
    path: Path = Field(description="the folder")
    resize: int | None = Field(
        None,
        ge=1,
        le=LARGEST_SIDE,
        description="height and width, by resizing the short side (bicubic) and cropping the centre",
    )
    as_stored: bool = Field(
        False, description="decoded as other tools do: not turned by EXIF data, 16-bit values cut at 255"
    )


class File(Strict):
    """An .npz of images (arr_0, uint8, NHWC), of statistics (mu, sigma), or of both."""

    kind: Literal["npz"] = "npz"
    path: Path = Field(description="the file")


def parse(
    text: str, *, resize: int | None = None, split: str = "train", as_stored: bool = False
) -> Digits | Shapes | ImageFolder | File | HubDataset:
    """What a user names on the command line: digits, shapes (held out), an .npz, a folder, or a Hugging Face
    data set. as_stored: of a folder, how its files are decoded."""
    if not text:
        raise UserError(f"an empty name does not name images; give {NAMED}")
    path = expanded(text)
    if text == "digits":
        return Digits(kind="digits")
    if text == "shapes":
        return Shapes(kind="shapes", count=SHAPES, start=HELD_OUT)
    if path.suffix.lower() == ".npz" or path.suffix.lower() in PICKLES:
        return File(path=path)
    # os.path answers no for a name that no file can have; pathlib raises
    saved = any(os.path.isfile(path / name) for name in ("dataset_dict.json", "state.json"))
    if os.path.isdir(path) and not saved:
        return ImageFolder(path=path, resize=resize, as_stored=as_stored)
    if os.path.exists(path) and not saved:
        raise UserError(f"{text} is not an .npz, a folder or a data set; give one of these, digits or shapes")
    if not saved and (text.count("/") != 1 or text.startswith((".", "/", "~"))):
        raise UserError(f"{text} does not exist; give {NAMED} (owner/name)")
    if resize is None:
        remedy = (
            f"give it as {{kind: datasets, path: {text}, size: ...}}"
            if in_config()
            else f"add {called('resize')}"
        )
        raise UserError(f"{text} is not a folder or file here; as a data set it needs a size: {remedy}")
    return HubDataset(kind="datasets", path=text, size=resize, split=split)


def check_used(given: Sequence[str], *, resize: int | None, split: str | None) -> None:
    """Raises UserError for a size or a split that none of these sets, named as for `parse`, has a use for."""
    specs = [parse(text, resize=resize) for text in given]
    uses = (
        ("resize", resize, (ImageFolder, HubDataset), "folders and data sets are brought to a size"),
        ("split", split, (HubDataset,), "data sets have a split"),
    )
    for name, value, kinds, why in uses:
        if value is not None and not any(isinstance(spec, kinds) for spec in specs):
            raise UserError(f"{called(name)} {value} does nothing here: only {why}; leave it out")


Spec = Annotated[
    Digits | Shapes | ImageFolder | File | Folder | HubDataset,
    Field(discriminator="kind"),
    BeforeValidator(
        lambda given: parse(given) if isinstance(given, str) else given
    ),  # as on the command line
]


def images_of(
    spec: Digits | Shapes | ImageFolder | File | Folder | HubDataset,
    arrays: dict[str, np.ndarray] | None = None,
) -> Source:
    """Opens a set of images. Raises UserError for fewer than 2 and for images that cannot be read.

    arrays: of an .npz that was read already.
    """
    if isinstance(spec, ImageFolder):
        source: Source = FolderSource(spec.path, spec.resize, as_stored=spec.as_stored)
    elif isinstance(spec, File):
        source = ArraySource(spec.path, read_npz(spec.path) if arrays is None else arrays)
    else:
        source = DataSource(spec.load())
    if len(source) < 2:
        raise UserError(f"{source.name} holds {len(source)} image; a covariance needs at least 2")
    return source
