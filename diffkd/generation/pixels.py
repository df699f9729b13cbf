"""From x0 to 8-bit pixels, and from the device to the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkd.errors import UserError


def to_uint8(x0: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] -> (B, H, W, C) uint8, by the operations of the stock pipelines."""
    shades = (x0 / 2).add_(0.5).clamp_(0, 1).mul_(255).round_()
    return shades.to(torch.uint8).permute(0, 2, 3, 1)


def to_pixels(x0: Tensor) -> tuple[Tensor, Tensor]:
    """x0 (B, C, H, W) -> uint8 (B, H, W, C), contiguous, and a bool scalar: whether all of x0 is finite."""
    return to_uint8(x0).contiguous(), x0.isfinite().all()


def check_finite(finite: Tensor) -> None:
    """Raises UserError where a model's values were not finite; waits for the device."""
    if not finite:
        raise UserError(
            "the model produces images with NaN or infinite values; its weights or its steps are broken"
        )


def host_arrays(batches: Iterator[tuple[Tensor, Tensor]], device: torch.device) -> Iterator[np.ndarray]:
    """Pixels of `to_pixels` as arrays, each valid until the next is asked for, checked to be finite.

    From CUDA a batch is copied on a stream of its own, into one of two pinned buffers, while the next one is
    computed. No batch is larger than the first two.
    """
    if device.type != "cuda":
        for pixels, finite in batches:
            check_finite(finite)
            yield pixels.cpu().numpy()
        return
    stream = torch.cuda.Stream(device)
    buffers: list[tuple[Tensor, Tensor]] = []
    copies: list[tuple[Tensor, Tensor, Any]] = []
    for number, (pixels, finite) in enumerate(batches):
        if number < 2:
            buffers.append((_pinned(pixels), _pinned(finite)))
        pixels_buffer, finite_buffer = buffers[number % 2]
        pixels_buffer = pixels_buffer[: len(pixels)]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for buffer, x in ((pixels_buffer, pixels), (finite_buffer, finite)):
                buffer.copy_(x, non_blocking=True)
                x.record_stream(stream)
        copies.append((pixels_buffer, finite_buffer, stream.record_event()))
        if number:
            yield _completed(*copies.pop(0))
    for copy in copies:
        yield _completed(*copy)


def _pinned(like: Tensor) -> Tensor:
    return torch.empty_like(like, device="cpu").pin_memory()


def _completed(pixels: Tensor, finite: Tensor, event: Any) -> np.ndarray:
    event.synchronize()
    check_finite(finite)
    return pixels.numpy()
