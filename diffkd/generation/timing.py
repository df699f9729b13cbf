"""Seconds by name, on the device's own clock where its work runs asynchronously."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")


class Timer:
    """Seconds by name. On CUDA, `device` measures between two events of the stream, without waiting."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.started = time.perf_counter()
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def host(self, name: str) -> Iterator[None]:
        """Adds the time of the block, on the host's clock, to `name`."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - before

    @contextmanager
    def device(self, name: str) -> Iterator[None]:
        """Adds the time that the device takes for the block's work to `name`."""
        if not self.cuda:
            with self.host(name):
                yield
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._events.append((name, start, end))
        while self._events and self._events[0][2].query():  # those that are over, so this never waits
            self._settle()

    def iterate(self, name: str, items: Iterator[Item]) -> Iterator[Item]:
        """The same items; adds the time that the iterator takes to produce them to `name`."""
        while True:
            with self.device(name):
                following = next(items, _END)
            if following is _END:
                return
            yield following  # type: ignore[misc]

    def _settle(self) -> None:
        name, start, end = self._events.pop(0)
        end.synchronize()
        self._seconds[name] += start.elapsed_time(end) / 1000

    def seconds(self) -> dict[str, float]:
        """The seconds so far, by name; waits for the device."""
        while self._events:
            self._settle()
        return dict(self._seconds)

    def elapsed(self) -> float:
        """Seconds on the host since the timer was made."""
        return time.perf_counter() - self.started


_END = object()
