"""A folder of image files, with classes by subfolder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from diffkd.data.decoding import SUFFIXES, image_files, open_image
from diffkd.data.images import Images, Sized
from diffkd.errors import UserError


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
