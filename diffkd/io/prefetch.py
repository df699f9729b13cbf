"""Items prepared ahead of use by a thread; copies between host and device that do not stall."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def prefetch(items: Iterator[Item], depth: int = 2) -> Iterator[Item]:
    """The same items in the same order, up to `depth` of them prepared while an earlier one is in use.

    An exception of the iterator is raised in the place of the item that failed.
    """
    with ThreadPoolExecutor(1, "diffkd-prefetch") as pool:
        waiting: deque[Future[list[Item]]] = deque()
        try:
            while True:
                while len(waiting) < depth + 1:
                    waiting.append(pool.submit(_next, items))
                item = waiting.popleft().result()
                if not item:
                    return
                yield item[0]
        finally:
            for future in waiting:
                future.cancel()


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on the device. A copy to CUDA is asynchronous, from pinned memory."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def to_host(x: Tensor) -> list[float]:
    """The values of a small vector, (n,), once they are computed: work queued later is not waited for."""
    if x.device.type != "cuda":
        values: list[float] = x.tolist()
        return values
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    pinned.copy_(x, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    done.synchronize()
    return pinned.tolist()


def _next(items: Iterator[Item]) -> list[Item]:
    """[the next item], or [] at the end: StopIteration cannot pass through a future."""
    for item in items:
        return [item]
    return []
