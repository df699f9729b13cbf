"""Arrays of an .npz file that anybody may have written: nothing is unpickled."""

from __future__ import annotations

import math
import zipfile
from collections import Counter
from collections.abc import Container
from pathlib import Path

import numpy as np

from diffkd.errors import UserError
from diffkd.io.text import quoted, reason

PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt")


# Arrays may be that large, or that much larger than their file: more is zeros packed to fill a memory.
MOST_BYTES, MOST_PACKED = 1 << 30, 100
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npz(path: Path | str, only: Container[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an .npz, or those of `only`. Raises UserError for what cannot be read without unpickling,
    and for arrays that are not as large as they claim."""
    path = Path(path)
    if path.suffix.lower() in PICKLES:
        raise UserError(
            f"{path} is a pickle, which can run code when it is opened; where you trust it, convert it: "
            "numpy.savez('ref.npz', mu=..., sigma=...) of what pickle.load gives"
        )
    try:
        with path.open("rb") as stream:
            if stream.read(6) == np.lib.format.MAGIC_PREFIX:
                raise ValueError("it is a single array; numpy.savez writes named ones")
            with zipfile.ZipFile(stream) as archive:
                members = [one for one in archive.infolist() if one.filename.endswith(".npy")]
                names = [one.filename.removesuffix(".npy") for one in members]
                name, times = max(Counter(names).items(), key=lambda one: one[1], default=("", 0))
                if times > 1:
                    raise ValueError(f"it has {times} arrays called {quoted(name)}")
                wanted = [(n, m) for n, m in zip(names, members, strict=True) if only is None or n in only]
                total, size = sum(m.file_size for _, m in wanted), path.stat().st_size
                if total > max(MOST_BYTES, MOST_PACKED * size):
                    raise ValueError(f"its arrays are {total >> 20} MiB, packed into {size >> 20}")
                return {name: _read_member(archive, member) for name, member in wanted}
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there; check the path, or write it with diffkd stats") from error
    except Exception as error:  # numpy, zipfile and its decoders raise many kinds for a broken file
        raise UserError(
            f"{path} cannot be read as an .npz of plain arrays ({reason(error)}); write it again"
        ) from error


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """One array, after its header was compared with its size: numpy believes the header, and makes room."""
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in HEADERS:
            raise ValueError(f"{quoted(member.filename)} has a header of version {version}")
        shape, _, dtype = HEADERS[version](stream)
        if dtype.hasobject:
            raise ValueError(f"{quoted(member.filename)} is of objects, which are a pickle")
        if stream.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
            raise ValueError(f"{quoted(member.filename)} is not as large as its shape {shape} says")
    with archive.open(member) as stream:
        array: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
        return array
