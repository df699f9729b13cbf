"""Hugging Face datasets, from the hub or from a folder."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field

from diffkd.data.decoding import open_image
from diffkd.data.images import Images
from diffkd.data.listing import CAPTIONS
from diffkd.data.resized import ResizedDataset
from diffkd.errors import UserError
from diffkd.io.naming import option
from diffkd.io.text import reason


class HubDataset(ResizedDataset):
    """A Hugging Face dataset, by its name or the path of a saved one (extra `datasets`)."""

    kind: Literal["datasets"]
    path: str = Field(description="name on the hub, or a folder written by save_to_disk")
    subset: str | None = Field(None, description="configuration of a dataset that has several")
    split: str = Field("train", description="which split")
    image: str | None = Field(None, description="column of images; default the first of that type")
    label: str | None = Field(None, description="column of labels; default the first of type ClassLabel")
    text: str | None = Field(
        None, description="column of captions; default the one that is called text or caption, if any"
    )

    def load(self) -> Images:
        rows = self._rows()
        image = self._column(rows.features, self.image, "image column", "Image")
        if image is None:
            raise UserError(f"dataset {self.path} has no image column; it has {', '.join(rows.features)}")
        label = (
            self._column(rows.features, self.label, "column", "ClassLabel", "Value")
            if self.labelled
            else None
        )
        encoded = self._encoded(rows, image)
        pixels, readable = self.decode_all(
            self.path, len(rows), lambda i: _open(encoded[i][image]), lambda i: f"{self.path}[{i}]"
        )
        if not readable:
            raise UserError(f"dataset {self.path} (split {self.split}) holds no images")
        captions = self._captions(rows, readable)
        if label is None:
            return Images(self.path, pixels, flip=self.flip, captions=captions)
        values = [int(v) for v in rows[label]]
        if min(values) < 0:
            raise UserError(
                f"dataset {self.path} has label {min(values)} in row {values.index(min(values))}, "
                "which is not a class; use a split with labels"
                f"{option(', or set {}: false', 'data.labelled')}"
            )
        classes = list(getattr(rows.features[label], "names", None) or map(str, range(max(values) + 1)))
        labels = torch.tensor([values[i] for i in readable])
        return Images(self.path, pixels, labels, classes, self.flip, captions)

    def _captions(self, rows: Any, readable: Sequence[int]) -> list[str]:
        """Of the readable images; [] without a column of them. Of several captions the first counts."""
        name = self.text or next((key for key in CAPTIONS if key in rows.features), None)
        if name is None:
            return []
        if name not in rows.features:
            raise UserError(f"dataset {self.path} has no column {name!r}; it has {', '.join(rows.features)}")
        values = list(rows[name])  # a lazy column reads a row anew each time
        found = [values[i][0] if isinstance(values[i], list) and values[i] else values[i] for i in readable]
        if not all(value is None or isinstance(value, str | list) for value in found):
            if self.text is None:
                return []
            raise UserError(f"dataset {self.path} has no captions in column {name!r}; name another, or none")
        return [value if isinstance(value, str) else "" for value in found]

    def _encoded(self, rows: Any, image: str) -> Any:
        """The rows with their images as encoded files, to be decoded like those of a folder."""
        feature = copy.copy(rows.features[image])
        feature.decode = False
        return rows.select_columns([image]).cast_column(image, feature)

    def _column(self, features: Any, name: str | None, what: str, *kinds: str) -> str | None:
        """The named column, checked to be of one of these kinds; by default the first of kinds[0], or
        None."""
        if name is None:
            return next((n for n, feature in features.items() if type(feature).__name__ == kinds[0]), None)
        if name not in features:
            raise UserError(f"dataset {self.path} has no {what} {name!r}; it has {', '.join(features)}")
        kind = type(features[name]).__name__
        if kind not in kinds or (kind == "Value" and "int" not in features[name].dtype):
            raise UserError(
                f"dataset {self.path} has no {kinds[0]} in column {name!r}; it has {', '.join(features)}"
            )
        return name

    def _rows(self) -> Any:
        """The split as a datasets.Dataset."""
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise UserError(
                "data kind datasets needs the datasets package; install it with pip install datasets"
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
                f"dataset {self.path} (split {self.split}) cannot be read: {reason(error)}"
            ) from error


def _open(encoded: Mapping[str, Any]) -> Image.Image:
    """The image of a row, which holds its bytes or the path of a file."""
    return open_image(Path(encoded["path"]) if encoded["bytes"] is None else io.BytesIO(encoded["bytes"]))
