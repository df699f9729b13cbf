"""What processes exchange, counted where torch hands it to gloo."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Exchanges(TorchDispatchMode):
    """Bytes of the collectives that this thread starts, by their kind: of what is gathered, scattered or
    reduced the whole tensor, as one process alone would hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            sizes = [_size(arg) for arg in args]
            self.bytes[func.__name__.split(".")[0].strip("_")] += max(sizes, default=0)
        return func(*args, **(kwargs or {}))


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0
