"""Float32 arithmetic in full precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

HALF = (torch.bfloat16, torch.float16)


@contextmanager
def full_float32(device_type: str, network: nn.Module | None = None) -> Iterator[None]:
    """No autocast, and no TF32 in convolutions and matrix products, whose 10-bit mantissas move FID and swamp
    differences of nearly equal states. Every other setting stays as it is.

    network: one that accelerate may have prepared, whose forward then switches autocast on by itself. Weights
    of it in half precision, which are of the base that its adapter shares, are float32 meanwhile.
    """
    with ExitStack() as stack:
        # Newer torch has a setting per operation, and where a user has used it the old one, cudnn.flags with
        # it, raises or has no effect. Older torch has only the old one.
        cudnn: Any = torch.backends.cudnn
        for holder in (getattr(cudnn, "conv", cudnn), torch.backends.cuda.matmul):
            name, value = ("fp32_precision", "ieee") if hasattr(cudnn, "conv") else ("allow_tf32", False)
            stack.callback(setattr, holder, name, getattr(holder, name))
            setattr(holder, name, value)
        stack.enter_context(torch.autocast(device_type, enabled=False))
        inner: Any = getattr(network, "module", network)
        if (original := getattr(inner, "_original_forward", None)) is not None:
            stack.callback(setattr, inner, "forward", inner.forward)
            inner.forward = original
        for weight in () if network is None else network.parameters():
            if weight.dtype in HALF:
                stack.callback(setattr, weight, "data", weight.data)
                weight.data = weight.data.float()
        yield
