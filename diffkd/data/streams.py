"""Rows of a Hugging Face dataset that are read as they come, and never written to the disk."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkd.data.packed import PackedStrings
from diffkd.data.shards import Shards, keyed
from diffkd.data.tables import builder_of, is_saved, reading, undecoded
from diffkd.errors import UserError
from diffkd.io.naming import called
from diffkd.io.text import from_json, reason

TOGETHER = 1000  # rows that are listed at once
ABOUT = {"count": int, "image": str, "classes": list}


class Streamed:
    """A split that is read in passes, each from its first file on: a row costs the reading of those before.

    path, subset, split: as `tables.open_rows` has them. fingerprint: what tells these rows from others, the
    same that they have on the disk. Raises UserError for what cannot be read, or lies there already.
    """

    def __init__(self, path: str, subset: str | None, split: str) -> None:
        self.path, self.subset, self.split = path, subset, split
        if is_saved(path):
            raise UserError(
                f"{called('data.streaming')} is for rows that would be written to the disk first, and {path} "
                "lies there as save_to_disk wrote it; leave it out"
            )
        with reading(path, split) as datasets:
            self.fingerprint: str = builder_of(datasets, path, subset)._get_dataset_fingerprint(split)
        self.image = ""  # the column that `fetch` reads
        self._pass: Iterator[Any] | None = None
        self._next = 0  # the row that this pass comes to
        self._held = deque[dict[int, Any]]([{}], maxlen=2)  # of a batch, and of one that is read ahead
        self._lock = threading.Lock()

    @cached_property
    def features(self) -> Any:
        """Of its columns, by the head of its first file."""
        with reading(self.path, self.split):
            return self._rows(None).features

    def table(self, columns: list[str]) -> Any:
        """These columns of all rows, as a `datasets.Dataset` in memory; parquet is read no further."""
        with reading(self.path, self.split) as datasets:
            features = datasets.Features({name: self.features[name] for name in columns})
            batches = self._rows(columns).iter(TOGETHER)
            parts = [datasets.Dataset.from_dict(batch, features=features) for batch in batches]
            return datasets.concatenate_datasets(parts) if parts else datasets.Dataset.from_dict({})

    def count(self, column: str) -> int:
        """Its rows, by a pass over one column."""
        with reading(self.path, self.split):
            return sum(1 for _ in undecoded(self._rows([column]), column))

    def fetch(self, rows: Sequence[int]) -> None:
        """Reads these rows' images, encoded, for `held`: on from where the last ones ended, or for one before
        that from the beginning. Raises UserError where that fails; the next call begins anew."""
        with self._lock:
            found: dict[int, Any] = {}
            for row in sorted({*rows}):
                if self._pass is None or row < self._next:
                    with reading(self.path, self.split):
                        stream = undecoded(self._rows([self.image]), self.image)
                        self._pass, self._next = iter(stream.skip(row)), row
                while self._next <= row:
                    image = self._come(self._pass)
                found[row] = image
            self._held.append(found)

    def held(self, row: int) -> Any:
        """The image of a row that was fetched in the last batch, or in the one before."""
        return next(found[row] for found in reversed(self._held) if row in found)

    def _come(self, rows: Iterator[Any]) -> Any:
        try:
            image = next(rows)[self.image]
        except StopIteration:
            self._pass = None
            raise UserError(
                f"dataset {self.path} (split {self.split}) ends after {self._next:,} rows, and had more when "
                "they were listed; use another cache"
            ) from None
        except UserError:
            raise
        except Exception as error:  # whatever a network makes `datasets` raise
            self._pass = None
            raise UserError(
                f"dataset {self.path} (split {self.split}) cannot be read on from row {self._next:,} "
                f"({reason(error)}); the same command goes on"
            ) from error
        self._next += 1
        return image

    def _rows(self, columns: list[str] | None) -> Any:
        """A pass over these columns, as a datasets.IterableDataset; None for all."""
        import datasets

        builder = builder_of(datasets, self.path, self.subset)
        if columns is not None and hasattr(builder.config, "columns"):
            builder.config.columns = columns  # of parquet: all else is left unread
        rows = builder.as_streaming_dataset(self.split)._resolve_features()
        return rows if columns is None else rows.select_columns(columns)


@dataclass(frozen=True)
class Listed:
    """What a pass over a stream found beside its images: how many, the column that they are in, and of each
    its label and caption, where there are any. key: what tells it from that of other rows or columns.

    Kept beside the latents, it is found once and not at every start.
    """

    key: str
    count: int
    image: str
    labels: Tensor | None
    classes: list[str]
    captions: PackedStrings

    @staticmethod
    def kept_in(folder: Path | None, key: str) -> Listed | None:
        """That which was kept in a folder; None where there is none."""
        about: dict[str, Any] = {}

        def check(found: dict[str, Tensor]) -> None:
            content = from_json(bytes(found["about"].numpy()).decode())
            if not isinstance(content, dict) or {k: type(v) for k, v in content.items()} != ABOUT:
                raise ValueError("it says something else")
            about.update(content)
            shapes = {name: (about["count"] + extra,) for name, extra in (("labels", 0), ("ends", 1))}
            if any(name in found and found[name].shape != shape for name, shape in shapes.items()):
                raise ValueError("it holds other tensors")

        found = None if folder is None else _place(folder, key).read(0, check)
        if found is None:
            return None
        captions = PackedStrings(())
        if "ends" in found:
            text = found["text"].numpy() if "text" in found else b""
            captions = PackedStrings.of(bytes(text), found["ends"].numpy())
        return Listed(key, about["count"], about["image"], found.get("labels"), about["classes"], captions)

    def keep(self, folder: Path) -> None:
        """Writes it, where it is not there; by one process."""
        place = _place(folder, self.key)
        if place.missing():
            about = {"count": self.count, "image": self.image, "classes": self.classes}
            tensors = {"about": _bytes(json.dumps(about).encode())}
            if self.labels is not None:
                tensors["labels"] = self.labels
            text, ends = self.captions.packed
            tensors |= {"text": _bytes(text)} if text else {}
            tensors |= {"ends": torch.from_numpy(ends)} if len(self.captions) else {}
            place.begin()
            place.write(0, tensors)


def _bytes(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy())


def _place(folder: Path, key: str) -> Shards:
    return keyed(folder, "rows", {"rows": key}, 1, 1)
