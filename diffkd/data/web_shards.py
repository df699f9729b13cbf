"""WebDataset shards, tar files of samples, read by `datasets` (whose presence this module requires)."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any

from datasets.packaged_modules.webdataset.webdataset import WebDataset

from diffkd.errors import UserError
from diffkd.io.text import log, reason

UNPICKLED = (".pkl", ".pickle", ".pyd", ".pt", ".pth")  # by datasets, were they let through
WRITTEN = (".txt", ".text", ".caption", ".json")


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
        return super()._get_pipeline_from_tar(tar_path, _checked(tar_path, tar_iterator))


def _warn_if_cut(shard: str) -> None:
    """Reading stops at a header that was cut as at the end of a file."""
    with open(shard, "rb") as file:
        file.seek(max(0, os.path.getsize(shard) - tarfile.BLOCKSIZE))
        if any(file.read()):
            log.warning("%s does not end as tar files do: it may be cut off, and hold more", shard)


def _checked(shard: str, files: Any) -> Iterator[tuple[str, IO[bytes]]]:
    """The files of a shard. Raises UserError for a pickle, and for text that is none."""
    for name, file in files:
        if any(suffix.lower() in UNPICKLED for suffix in PurePosixPath(name).suffixes):
            raise UserError(
                f"{os.path.basename(shard)} holds {name}, and pickles can run code; write the shards without"
            )
        if PurePosixPath(name).suffix.lower() in WRITTEN:
            content = file.read()
            try:
                content.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{os.path.basename(shard)} holds {name}, which is not text in UTF-8 ({reason(error)}); "
                    "repair it, or take the sample out"
                ) from error
            file = io.BytesIO(content)
        yield name, file
