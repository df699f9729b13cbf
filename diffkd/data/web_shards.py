"""WebDataset shards, tar files of samples, read by `datasets` (whose presence this module requires)."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any

from datasets.packaged_modules.webdataset.webdataset import WebDataset

from diffkd.errors import UserError
from diffkd.io.text import log

UNPICKLED = (".pkl", ".pickle", ".pyd", ".pt", ".pth")  # by datasets, were they let through


def _text(content: bytes) -> str:
    return content.decode("utf-8-sig")


def _caption(content: bytes) -> str:
    return " ".join(_text(content).split())


class WebShards(WebDataset):
    """Of a sample's files the image, its text and its class are read; any other stays the bytes that it is.

    Raises UserError for shards that hold pickles.
    """

    DECODERS = {"txt": _caption, "text": _caption, "caption": _caption, "json": _text, "cls": int}

    @classmethod
    def in_place_of(cls, builder: Any) -> Any:
        """This reader of a builder's shards, or the builder itself where it is of something else."""
        if not isinstance(builder, WebDataset):
            return builder
        files = builder.config.data_files
        for shard in (path for split in files.values() for path in split if os.path.isfile(path)):
            _warn_if_cut(shard)
        return cls(data_files=files)

    @classmethod
    def _get_pipeline_from_tar(cls, tar_path: str, tar_iterator: Any) -> Iterator[dict[str, Any]]:
        return super()._get_pipeline_from_tar(tar_path, _without_pickles(tar_path, tar_iterator))


def _warn_if_cut(shard: str) -> None:
    """Reading stops at a header that was cut as at the end of a file."""
    with open(shard, "rb") as file:
        file.seek(max(0, os.path.getsize(shard) - tarfile.BLOCKSIZE))
        if any(file.read()):
            log.warning("%s does not end as tar files do: it may be cut off, and hold more", shard)


def _without_pickles(shard: str, files: Any) -> Iterator[tuple[str, IO[bytes]]]:
    for name, file in files:
        if any(suffix.lower() in UNPICKLED for suffix in PurePosixPath(name).suffixes):
            raise UserError(
                f"{os.path.basename(shard)} holds {name}, and pickles can run code; write the shards without"
            )
        yield name, file
