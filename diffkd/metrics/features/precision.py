"""Float32 arithmetic in full precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """No autocast, and no TF32 in cuDNN's convolutions: its 10-bit mantissas move FID. Every other setting
    stays as it is."""
    cudnn: Any = torch.backends.cudnn
    # Newer torch has a setting per operation, and where a user has used it the old one, cudnn.flags with it,
    # raises or has no effect. Older torch has only the old one.
    holder, name, value = (
        (cudnn.conv, "fp32_precision", "ieee") if hasattr(cudnn, "conv") else (cudnn, "allow_tf32", False)
    )
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        setattr(holder, name, before)
