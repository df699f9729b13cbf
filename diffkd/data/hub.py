"""Hugging Face datasets, from the hub, a folder, or files that `datasets` reads."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from diffkd.data.decoding import open_image
from diffkd.data.images import Images
from diffkd.data.metadata import CAPTIONS, caption_of
from diffkd.data.packed import PackedStrings
from diffkd.data.resized import ResizedDataset
from diffkd.data.streams import Listed, Streamed
from diffkd.data.tables import open_rows, undecoded
from diffkd.errors import UserError
from diffkd.io.naming import called, option
from diffkd.io.text import from_json, reason

TOGETHER = 1000  # rows of captions that are read at once


class HubDataset(ResizedDataset):
    """A Hugging Face dataset, by its name or the path of a saved one, or files such as WebDataset shards
    (extra `datasets`)."""

    kind: Literal["datasets"]
    path: str = Field(
        description="name on the hub, a folder written by save_to_disk, or files: a folder or a pattern "
        "(shards/*.tar) of WebDataset shards, parquet, json, csv or arrow"
    )
    subset: str | None = Field(None, description="configuration of a dataset that has several")
    split: str = Field("train", description="which split")
    image: str | None = Field(None, description="column of images; default the first of that type")
    label: str | None = Field(None, description="column of labels; default the first of type ClassLabel")
    text: str | None = Field(
        None,
        description="column of captions; default the one that is called text, caption or txt, or these keys "
        "of a column json; json.prompt is another key",
    )
    streaming: bool = Field(
        False,
        description="for models of latents: read as it comes, encoded once, and never written to the disk",
    )

    def load(self) -> Images:
        """The images decoded, in memory."""
        if self.streaming:
            raise UserError(
                f"{called('data.streaming')} is for the images of a model of latents, of which each is "
                "encoded once; these are all held as pixels: leave it out"
            )
        rows, image = self._opened()
        labels, classes = self._labels(rows)
        captions = self._captions(rows)
        encoded = undecoded(rows, image)
        pixels, readable = self.decode_all(
            self.path, len(rows), lambda i: _open(encoded[i][image]), lambda i: f"{self.path}[{i}]"
        )
        if labels is not None:
            labels = labels[torch.tensor(readable)]
        return Images(
            self.path, pixels, labels, classes, self.flip, [captions[i] for i in readable] if captions else []
        )

    def open(self, kept: Path | None = None) -> Images:
        """The images, decoded when they are asked for. Their fingerprint is the one that `datasets` gives.
        kept: as in `Folder.open`."""
        if self.streaming:
            return self._streamed(kept)
        rows, image = self._opened()
        labels, classes = self._labels(rows)
        encoded = undecoded(rows, image)
        captions = self._captions(rows)
        return self.on_demand(
            len(rows), lambda i: _open(encoded[i][image]), lambda i: f"{self.path}[{i}]",
            f"{rows._fingerprint} {image}",
            lambda pixels: Images(self.path, pixels, labels, classes, self.flip, captions), kept,
        )  # fmt: skip

    def _streamed(self, kept: Path | None) -> Images:
        """`open`, of rows that are not written to the disk: all else of them was kept, or takes a pass."""
        if self.buckets is not None:
            raise UserError(
                f"{called('data.buckets')} goes by the sizes of all images before the first is encoded, and "
                f"{called('data.streaming')} gives each but once; leave out one of the two"
            )
        stream = Streamed(self.path, self.subset, self.split)
        key = f"{stream.fingerprint} {self.image} {self.label} {self.text} {self.labelled}"
        listed = Listed.kept_in(kept, key) or self._listed(stream, key)
        stream.image = listed.image
        return self.on_demand(
            listed.count, lambda i: _open(stream.held(i)), lambda i: f"{self.path}[{i}]",
            f"{stream.fingerprint} {listed.image}",
            lambda pixels: Images(
                self.path, pixels, listed.labels, listed.classes, self.flip, listed.captions, listed
            ),
            None, stream.fetch,
        )  # fmt: skip

    def _listed(self, stream: Streamed, key: str) -> Listed:
        """By a pass over the columns of labels and captions, or over a smaller one than the images'."""
        image = self._image_column(stream.features)
        chosen = {self._label_column(stream.features), self._caption_column(stream.features)[0]}
        columns = [name for name in stream.features if name in chosen]
        rows = stream.table(columns) if columns else None
        other = next((name for name in stream.features if name != image), image)
        count = stream.count(other) if rows is None else len(rows)
        if not count:
            raise self._empty()
        labels, classes = (None, []) if rows is None else self._labels(rows)
        captions = PackedStrings(()) if rows is None else self._captions(rows)
        return Listed(key, count, image, labels, classes, captions)

    def _opened(self) -> tuple[Any, str]:
        """The rows, and the column of their images."""
        rows = open_rows(self.path, self.subset, self.split)
        image = self._image_column(rows.features)
        if not len(rows):
            raise self._empty()
        return rows, image

    def _empty(self) -> UserError:
        return UserError(f"dataset {self.path} (split {self.split}) holds no images")

    def _image_column(self, features: Any) -> str:
        image = self.image
        if image is None or image not in features or not _holds_files(features[image]):
            image = self._column(features, image, "image column", "Image")
        if image is None:
            raise UserError(
                f"dataset {self.path} has no image column; it has {', '.join(features)}"
                f"{option('; name one of encoded images by {}', 'data.image')}"
            )
        return image

    def _label_column(self, features: Any) -> str | None:
        if not self.labelled:
            return None
        return self._column(features, self.label, "column", "ClassLabel", "Value")

    def _labels(self, rows: Any) -> tuple[Tensor | None, list[str]]:
        """Of every row, (N,) int64, and the names of the classes; None without a column of them."""
        name = self._label_column(rows.features)
        if name is None:
            return None, []
        column = rows.select_columns([name]).with_format("arrow")[:][name]
        values = column.fill_null(-1).to_numpy().astype(np.int64)
        if values.min() < 0:
            raise UserError(
                f"dataset {self.path} has label {values.min()} in row {values.argmin()}, "
                "which is not a class; use a split with labels"
                f"{option(', or set {}: false', 'data.labelled')}"
            )
        names = getattr(rows.features[name], "names", None) or map(str, range(values.max() + 1))
        return torch.from_numpy(values), list(names)

    def _captions(self, rows: Any) -> PackedStrings:
        """Of every row; none without a column of them. Of several captions the first counts."""
        column, key = self._caption_column(rows.features)
        if column is None:
            return PackedStrings(())
        try:
            found = PackedStrings(_texts(rows.select_columns([column]), column, key))
        except TypeError as error:
            if self.text is None:
                return PackedStrings(())
            raise UserError(
                f"dataset {self.path} has no captions in column {self.text!r}; name another, or none"
            ) from error
        except ValueError as error:
            raise UserError(
                f"dataset {self.path} has captions in column {column!r} that are not JSON ({reason(error)}); "
                "repair them, or name another column"
            ) from error
        return found if self.text is not None or any(found) else PackedStrings(())

    def _caption_column(self, features: Any) -> tuple[str | None, str | None]:
        """Its name, and the key in its JSON; None where there is none."""
        if self.text is None:
            found = next((name for name in (*CAPTIONS, "txt", "json") if name in features), None)
            return found, None
        column, _, key = (self.text, "", "") if self.text in features else self.text.partition(".")
        if column not in features:
            raise UserError(f"dataset {self.path} has no column {column!r}; it has {', '.join(features)}")
        return column, key or None

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


def _holds_files(feature: Any) -> bool:
    """Whether a column that is not declared to be of images may be: bytes, alone or beside a path."""
    held = feature.get("bytes") if isinstance(feature, Mapping) else feature
    return getattr(held, "dtype", None) in ("binary", "large_binary")


def _open(encoded: Any) -> Image.Image:
    """The image of a row, which holds its bytes or the path of a file, of one that is streamed on the hub."""
    if isinstance(encoded, bytes):
        return open_image(io.BytesIO(encoded))
    if encoded is None or (encoded["bytes"] is None and not encoded.get("path")):
        raise ValueError("the row has no image")
    content, path = encoded["bytes"], encoded.get("path")
    if content is None and str(path).rpartition("::")[2].startswith("hf://"):
        import fsspec

        with fsspec.open(path, "rb") as file:
            content = file.read()
    return open_image(Path(path) if content is None else io.BytesIO(content))


def _texts(rows: Any, column: str, key: str | None) -> Iterator[str]:
    """The caption of each row, "" for none. Raises TypeError for what is no text."""
    for start in range(0, len(rows), TOGETHER):
        for value in rows[start : start + TOGETHER][column]:
            yield _text(value, key, in_json=column == "json" or key is not None)


def _text(value: Any, key: str | None, *, in_json: bool) -> str:
    if in_json:
        value = from_json(value) if isinstance(value, str) else value
        keys = CAPTIONS if key is None else (key,)
        given = [value[key] for key in keys if key in value] if isinstance(value, dict) else []
        return next((text for each in given if (text := caption_of(each))), "")
    return caption_of(value)
