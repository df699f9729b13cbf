"""Rows of a Hugging Face dataset: from the hub, of a saved one, or of files that `datasets` reads.

Rows lie in Arrow files that are mapped: those of files are written once to the cache of `datasets`, one after
the other, and any row is then found by its index. `streams` reads rows that are not to lie there.
"""

from __future__ import annotations

import copy
import glob
import os
import pkgutil
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffkd.errors import UserError
from diffkd.io.places import expanded
from diffkd.io.text import quoted, reason

SPLITS = "dataset_dict.json"  # in a folder that save_to_disk wrote of several splits
READERS = {
    ".tar": "webdataset", ".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json",
    ".csv": "csv",
}  # fmt: skip


def open_rows(path: str, subset: str | None, split: str) -> Any:
    """A split as a datasets.Dataset.

    path: a name on the hub; a folder that save_to_disk wrote; a folder, a file, or a pattern (*, **) of files
    that READERS has. Raises UserError for what cannot be read.
    """
    place = expanded(path)
    with reading(path, split) as datasets:
        if is_saved(path):
            found = datasets.load_from_disk(str(place))
            if not os.path.isfile(place / SPLITS):
                return found
            if split not in found:
                raise ValueError(f"it has {', '.join(found)}")
            return found[split]
        builder = builder_of(datasets, path, subset)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)


def is_saved(path: str) -> bool:
    """Whether it is a folder that save_to_disk wrote."""
    return any(os.path.isfile(expanded(path) / name) for name in (SPLITS, "state.json"))


def undecoded(rows: Any, image: str) -> Any:
    """Rows, streamed or not, with nothing but their images as encoded files, to be decoded like those of a
    folder."""
    chosen, feature = rows.select_columns([image]), copy.copy(rows.features[image])
    if not hasattr(feature, "decode"):
        return chosen
    feature.decode = False
    return chosen.cast_column(image, feature)


@contextmanager
def reading(path: str, split: str) -> Iterator[Any]:
    """The module `datasets`, quiet without a terminal; what it raises is a UserError of one line."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError(
            "data kind datasets needs the datasets package; install it with pip install datasets"
        ) from error
    try:
        with _quiet_without_terminal(datasets):
            yield datasets
    except UserError:
        raise
    except (OSError, ValueError, LookupError, tarfile.TarError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error  # a DatasetGenerationError says only that there is one
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(f"dataset {path} (split {split}) cannot be read: {reason(cause)}") from error


def builder_of(datasets: Any, path: str, subset: str | None) -> Any:
    """What prepares or streams the rows; of tar files by a reader that unpickles nothing."""
    from diffkd.data.web_shards import WebShards

    place = expanded(path)
    if os.path.isdir(place):
        made = datasets.load_dataset_builder(str(place.absolute()), subset)
    elif glob.has_magic(path) or os.path.exists(place):
        made = datasets.load_dataset_builder(_reader(path, place), data_files=_files(path, place))
    elif path in {module.name for module in pkgutil.iter_modules(datasets.packaged_modules.__path__)}:
        raise UserError(f"{path} is a kind of files, not a dataset; give a folder or a pattern of such files")
    else:
        made = datasets.load_dataset_builder(path, subset)
    return WebShards.in_place_of(made)


def _files(path: str, place: Path) -> list[str]:
    """The files of a pattern, or the one of this name, in the order of their names."""
    if os.path.exists(place):
        return [str(place.absolute())]
    found = sorted(name for name in glob.glob(str(place.absolute()), recursive=True) if os.path.isfile(name))
    if not found:
        raise UserError(f"{path} names no files; give a folder, or a pattern such as shards/*.tar")
    return found


def _reader(path: str, place: Path) -> str:
    suffixes = {Path(name).suffix.lower() for name in _files(path, place)}
    readers = {READERS.get(suffix) for suffix in suffixes}
    if len(readers) > 1 or None in readers:
        raise UserError(
            f"{path} names files of {', '.join(map(quoted, sorted(suffixes)))}; give those of one kind: "
            f"{', '.join(READERS)}"
        )
    return str(readers.pop())


@contextmanager
def _quiet_without_terminal(datasets: Any) -> Iterator[None]:
    """Without the bars of `datasets`, where there is no terminal to show them on."""
    hidden = sys.stderr.isatty() or datasets.are_progress_bars_disabled()
    if not hidden:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()
