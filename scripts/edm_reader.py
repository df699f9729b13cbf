"""Pickles of NVlabs' EDM and EDM2, read without running any of their code.

Of what a pickle names, tensors and arrays are rebuilt, and all else becomes a record of its state; a name
that no such pickle needs is refused.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffkd.errors import UserError


class Record:
    """An object of a class that is not imported: the name of that class, and what its state was."""

    kind = "?"

    def __init__(self, *_: Any, **__: Any) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.state = dict(state) if isinstance(state, Mapping) else {}


def _persistent(meta: Mapping[str, Any]) -> Record:
    """In place of torch_utils.persistence's function, which would run the code that meta holds."""
    made = Record()
    made.kind = str(meta["class_name"])
    made.__setstate__(meta["state"])
    return made


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """A view of a storage, copied, so that what it shares with others is not kept."""
    empty = torch.empty(0, dtype=storage.dtype)
    return empty.set_(storage._untyped_storage, offset, size, stride).clone()


def _storage(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


class _Dtype:
    def __init__(self, name: str, *_: Any) -> None:
        self.dtype = np.dtype(name)
        if self.dtype.kind not in "biuf":
            raise UserError(f"the pickle holds a number of type {name!r}; only plain numbers are read")

    def __setstate__(self, state: Any) -> None:
        """Byte order, which is this machine's for the networks published."""


def _scalar(dtype: _Dtype, content: bytes) -> Any:
    return np.frombuffer(content, dtype.dtype)[0].item()


class Array:
    """An array of plain numbers, made as it is found: by its shape, its type and its bytes."""

    def __init__(self, *_: Any) -> None:
        self.values = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, in_columns, content = state
        flat = np.frombuffer(content, dtype.dtype)
        self.values = flat.reshape(shape, order="F" if in_columns else "C").copy()


def _made(kind: type, *_: Any) -> Any:
    return kind.__new__(kind)


ALLOWED: dict[str, Callable[..., Any]] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "copyreg._reconstructor": _made,
    "builtins.object": object,
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.multiarray._reconstruct": Array,
    "numpy._core.multiarray._reconstruct": Array,
    "numpy.ndarray": Array,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in ALLOWED:
            return ALLOWED[full]
        if full == "dnnlib.util.EasyDict":
            return dict
        if full.startswith("torch.nn.modules.") and name[:1].isupper():
            return type(name, (Record,), {"kind": name})
        raise UserError(f"the pickle names {full}, which no network of EDM needs; it is not read")


class Content(NamedTuple):
    """The averaged network of a pickle, and what its images are encoded by, which those of EDM do not say."""

    network: Record
    encoder: Record | None


def read(path: Path) -> Content:
    """Raises UserError for a pickle of another kind."""
    try:
        with path.open("rb") as file:
            content = _Reader(file).load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # of torn or foreign files, many types
        raise UserError(f"{path} cannot be read as a pickle of EDM ({error}); is it complete?") from error
    found = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(found, Record):
        raise UserError(f"{path} holds no network named ema; give one of EDM's network pickles")
    encoder = content.get("encoder")
    return Content(found, encoder if isinstance(encoder, Record) else None)


def tensors_of(record: Record) -> dict[str, Tensor]:
    """Parameters and buffers by their names in a state dict."""
    found = {}
    for key in ("_parameters", "_buffers"):
        own = record.state.get(key) or {}
        found |= {name: value for name, value in own.items() if isinstance(value, Tensor)}
    for name, inner in (record.state.get("_modules") or {}).items():
        if isinstance(inner, Record):
            found |= {f"{name}.{key}": value for key, value in tensors_of(inner).items()}
    return found
