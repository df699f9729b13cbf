"""A folder of image files, with classes by subfolder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from diffkd.data.decoding import SUFFIXES, image_files, open_image
from diffkd.data.images import Images
from diffkd.data.resized import ResizedDataset
from diffkd.errors import UserError


class Folder(ResizedDataset):
    """A folder of images (PNG, JPEG, WebP, ...); its subfolders, if it has any, are the classes."""

    kind: Literal["folder"]
    path: Path = Field(description="the folder")

    def load(self) -> Images:
        root = self.path.expanduser()
        if not os.path.isdir(root):
            raise UserError(f"data.path {root} is not a folder; give a folder of images")
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
                f"{root} holds no images ({', '.join(SUFFIXES)}), neither in itself nor in subfolders"
            )
        pixels, readable = self.decode_all(
            str(root), len(paths), lambda i: open_image(paths[i]), lambda i: str(paths[i])
        )
        labels = None
        if classes and self.labelled:
            index = {name: n for n, name in enumerate(classes)}
            labels = torch.tensor([index[paths[i].relative_to(root).parts[0]] for i in readable])
        return Images(str(self.path), pixels, labels, classes if labels is not None else [], self.flip)
