"""The sha256 that identifies the weights of a network."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, shapes and float32 values in the order of names: of the weights, whatever file they
    came in. Counters of batches that batch normalisation keeps are no weights."""
    total = hashlib.sha256()
    for name in sorted(name for name in tensors if not name.endswith("num_batches_tracked")):
        value = tensors[name].detach()
        if is_traceable_wrapper_subclass(value):  # quantized ones as what they stand for
            value = value.dequantize()
        values = value.float().cpu().contiguous()
        total.update(f"{name} {tuple(values.shape)} ".encode())
        total.update(values.numpy().tobytes())
    return total.hexdigest()
