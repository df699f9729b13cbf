"""Arrays of an untrusted .npz file: nothing is unpickled."""

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
# Arrays may take MAX_BYTES, or MAX_RATIO times their file: beyond both they are a decompression bomb.
MAX_BYTES, MAX_RATIO = 1 << 30, 100
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npz(path: Path | str, only: Container[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an .npz by name, or of those only the ones in `only`. Raises UserError for what cannot be
    read without unpickling, and for arrays whose data do not match their shape."""
    path = Path(path)
    if path.suffix.lower() in PICKLES:
        raise UserError(
            f"{path} is a pickle, which can run code when it is opened; if you trust it, convert it: "
            "load it with pickle.load and save it with numpy.savez('ref.npz', mu=..., sigma=...)"
        )
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is a folder, a pipe or a device, not a file")
        with path.open("rb") as stream:
            if stream.read(6) == np.lib.format.MAGIC_PREFIX:
                raise ValueError("it is a single array; numpy.savez writes named ones")
            with zipfile.ZipFile(stream) as archive:
                members = [m for m in archive.infolist() if m.filename.endswith(".npy")]
                names = [m.filename.removesuffix(".npy") for m in members]
                name, count = max(Counter(names).items(), key=lambda item: item[1], default=("", 0))
                if count > 1:
                    raise ValueError(f"it has {count} arrays named {quoted(name)}")
                wanted = [(n, m) for n, m in zip(names, members, strict=True) if only is None or n in only]
                total, size = sum(m.file_size for _, m in wanted), path.stat().st_size
                if total > max(MAX_BYTES, MAX_RATIO * size):
                    raise ValueError(f"its arrays are {total >> 20} MiB, compressed into {size >> 20} MiB")
                return {name: _read_member(archive, member) for name, member in wanted}
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path, or write it with diffkd stats") from error
    except Exception as error:  # numpy, zipfile and its decoders raise many kinds for a broken file
        raise UserError(
            f"{path} cannot be read as an .npz of plain arrays ({reason(error)}); write it again"
        ) from error


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """One array. Its header is checked against its size: numpy would allocate whatever the header says."""
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in HEADERS:
            raise ValueError(f"{quoted(member.filename)} has a header of version {version}")
        shape, _, dtype = HEADERS[version](stream)
        if dtype.hasobject:
            raise ValueError(f"{quoted(member.filename)} holds Python objects, which are pickled")
        if stream.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
            raise ValueError(f"the size of {quoted(member.filename)} does not match its shape {shape}")
    with archive.open(member) as stream:
        array: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
        return array
