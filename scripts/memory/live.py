"""The memory of tensors while code runs, counted as torch makes and frees them; of fake tensors too."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Live(TorchDispatchMode):
    """Bytes of the storages that are made while it is entered: those alive now, and the most there were.

    known: tensors from before, such as weights, which views of them are not to be taken for. What kernels
    take for themselves and give back is not seen, nor how an allocator rounds.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()
        self._known = [tensor.untyped_storage() for tensor in known]
        self._seen.update(map(id, self._known))

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), options: Any = None) -> Any:
        made = call(*args, **(options or {}))
        for value in tree_iter(made):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return made

    def _note(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)

        def freed() -> None:
            self._seen.discard(key)
            self.now -= size

        weakref.finalize(storage, freed)
