"""A folder of image files, with classes by subfolder or by metadata files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from diffkd.data.decoding import open_image
from diffkd.data.images import Images
from diffkd.data.listing import ClassOrder, Listing, list_folder
from diffkd.data.resized import ResizedDataset
from diffkd.errors import UserError
from diffkd.io.naming import called, option
from diffkd.io.places import expanded
from diffkd.io.text import log


class Folder(ResizedDataset):
    """A folder of images (PNG, JPEG, WebP, ...); its subfolders, if it has any, are the classes.

    A metadata.jsonl or metadata.csv as of Hugging Face's imagefolder may give classes and captions instead.
    """

    kind: Literal["folder"]
    path: Path = Field(description="the folder")
    class_order: ClassOrder | None = Field(
        None, description="how class names are sorted: name (default), or number where they are numbers"
    )

    def load(self) -> Images:
        """The images decoded, in memory."""
        root, found = self._listed()
        pixels, readable = self.decode_all(
            str(root), len(found.paths), lambda i: open_image(found.paths[i]), lambda i: str(found.paths[i])
        )
        labels = None if found.labels is None else torch.tensor([found.labels[i] for i in readable])
        captions = [found.captions[i] for i in readable] if found.captions else []
        return Images(str(self.path), pixels, labels, found.classes, self.flip, captions)

    def open(self, kept: Path | None = None) -> Images:
        """The images, decoded when they are asked for; their fingerprint is of the files' names and sizes.
        kept: a folder that may have what an earlier run found out of them."""
        root, found = self._listed()
        names = found.paths.names
        files = hashlib.sha256()
        for name in names:
            files.update(f"{name}\0{_size(f'{root}/{name}')}\0".encode(errors="surrogateescape"))
        labels = None if found.labels is None else torch.tensor(found.labels)
        classes, captions = found.classes, found.captions
        return self.on_demand(
            len(names), lambda i: open_image(root / names[i]), lambda i: str(root / names[i]),
            files.hexdigest(),
            lambda pixels: Images(str(self.path), pixels, labels, classes, self.flip, captions), kept,
        )  # fmt: skip

    def _listed(self) -> tuple[Path, Listing]:
        """The folder, and what it holds."""
        root = expanded(self.path)
        if not os.path.isdir(root):
            raise UserError(f"{called('data.path')} {root} is not a folder; give a folder of images")
        found = list_folder(root, self.class_order or "name", labelled=self.labelled)
        told = bool(found.captions) or not self.labelled  # what is in them, or that classes do not matter
        if 0 < found.loose < len(found.paths) and found.labels is None and not told:
            inside = next(name for name in found.paths.names if "/" in name).partition("/")[0]
            raise UserError(
                f"{root} holds both images and class folders ({inside}, ...); keep one of the two, or give "
                f"labels in a metadata.jsonl{option(', or set {}: false', 'data.labelled')}"
            )
        if found.passed_over:
            log.warning("%s", passed_over(root, found.passed_over))
        return root, found


def _size(path: str) -> int:
    """In bytes; -1 for a link that leads nowhere."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def passed_over(root: Path, files: Sequence[Path]) -> str:
    """The line about files that are not read as images."""
    some = ", ".join(str(path.relative_to(root)) for path in files[:3]) + ", ..." * (len(files) > 3)
    count = f"{len(files)} file{'s' * (len(files) > 1)}"
    return f"{root}: {count} passed over, which no suffix says to be an image ({some})"
