"""Data made ahead of use, by a thread, and moved to a device that does not wait for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def prefetch(items: Iterator[Item], depth: int = 2) -> Iterator[Item]:
    """The same items in the same order; `depth` of them are made while earlier ones are used.

    What making one raises is raised where it would have come.
    """
    with ThreadPoolExecutor(1, "diffkd-ahead") as pool:
        waiting: deque[Future[list[Item]]] = deque()
        try:
            while True:
                while len(waiting) < depth + 1:
                    waiting.append(pool.submit(_next, items))
                found = waiting.popleft().result()
                if not found:
                    return
                yield found[0]
        finally:
            for future in waiting:
                future.cancel()


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on the device; one that runs on its own is not waited for."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def to_host(x: Tensor) -> list[float]:
    """The values of a small vector, (n,), as soon as the device has them: work that was given to it later is
    not waited for."""
    if x.device.type != "cuda":
        found: list[float] = x.tolist()
        return found
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    pinned.copy_(x, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    done.synchronize()
    return pinned.tolist()


def _next(items: Iterator[Item]) -> list[Item]:
    """The next item, or nothing at the end: StopIteration itself does not pass through a future."""
    for item in items:
        return [item]
    return []
