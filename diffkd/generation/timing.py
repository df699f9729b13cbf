"""Seconds by name, by the device's own clock where the work does not wait for the host."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Clock:
    """Seconds by name. On CUDA `device` takes them between two events of the stream, which stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.started = time.perf_counter()
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def host(self, name: str) -> Iterator[None]:
        before = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - before

    @contextmanager
    def device(self, name: str) -> Iterator[None]:
        if not self.cuda:
            with self.host(name):
                yield
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._events.append((name, start, end))
        while self._events and self._events[0][2].query():  # done: it waits for nothing
            self._settle()

    def _settle(self) -> None:
        name, start, end = self._events.pop(0)
        end.synchronize()
        self._seconds[name] += start.elapsed_time(end) / 1000

    def seconds(self) -> dict[str, float]:
        """So far; waits for the device."""
        while self._events:
            self._settle()
        return dict(self._seconds)

    def elapsed(self) -> float:
        return time.perf_counter() - self.started


class Stopwatch:
    """Seconds that an iterator takes to give its items, without waiting for the device in between."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[Any, Any]] = []

    def __call__(self, items: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        while True:
            started = self._now()
            item = next(items, None)
            self.marks.append((started, self._now()))
            if item is None:
                return
            yield item

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        if self.device.type != "cuda":
            return float(sum(b - a for a, b in self.marks))
        torch.cuda.synchronize()
        return float(sum(a.elapsed_time(b) for a, b in self.marks)) / 1000
