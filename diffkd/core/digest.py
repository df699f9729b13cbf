"""The sha256 that identifies the weights of a network."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, shapes and float32 values, sorted by name: it depends on the weights and not on their
    file. Batch normalisation's counters of batches are left out."""
    total = hashlib.sha256()
    for name in sorted(name for name in tensors if not name.endswith("num_batches_tracked")):
        value = tensors[name].detach()
        if is_traceable_wrapper_subclass(value):  # a quantized weight counts as the value that it stands for
            value = value.dequantize()
        values = value.float().cpu().contiguous()
        total.update(f"{name} {tuple(values.shape)} ".encode())
        total.update(values.numpy().tobytes())
    return total.hexdigest()
