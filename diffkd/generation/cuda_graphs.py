"""How a function of fixed shapes is run: as it is, as one CUDA graph, or compiled and then captured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffkd.errors import UserError

Mode = Literal["auto", "eager", "graph", "compile"]
MODES: tuple[str, ...] = ("auto", "eager", "graph", "compile")
Inputs = tuple[Tensor | None, ...]
Function = Callable[..., tuple[Tensor, ...]]


# What `auto` takes compilation to cost and to gain. Assumed: no GPU has been measured.
COMPILE_SECONDS = 60.0
COMPILE_GAIN = 0.2


@dataclass
class Runner:
    """path: what runs, for the user to read. seconds: of warm-up, capture, compilation. note: why it is not
    what would be faster."""

    call: Function
    path: str
    seconds: float = 0.0
    note: str | None = None

    @property
    def fixed(self) -> bool:
        """Whether every call has to have the shapes that it was prepared with."""
        return self.path != "eager"


def check(mode: str, device: torch.device) -> None:
    """Raises UserError for a mode that there is not, or not on this device."""
    if mode not in MODES:
        raise UserError(f"mode {mode!r} is unknown; use one of {', '.join(MODES)}")
    if mode == "graph" and device.type != "cuda":
        raise UserError(
            f"mode graph captures a CUDA graph, and the device is {device.type}; use eager or auto"
        )


def prepare(function: Function, inputs: Inputs, mode: str, device: torch.device, calls: int) -> Runner:
    """function, ready to be called `calls` times with tensors shaped like inputs.

    Off CUDA it runs as it is unless `compile` is asked for. On CUDA it is warmed up, so that memory runs out
    here if it does at all (torch.OutOfMemoryError). `auto` captures, compiles where so many calls pay for it,
    and where capturing fails runs as it is.
    """
    check(mode, device)
    if device.type != "cuda" and mode in ("auto", "eager"):
        return Runner(function, "eager")
    started = time.perf_counter()
    if mode == "compile":
        runner = _compiled(function, inputs, device)
    elif mode == "graph":
        runner = Runner(Graph(function, inputs), "graph")
    else:
        function(*inputs)
        runner = Runner(function, "eager") if mode == "eager" else _best(function, inputs, device, calls)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    runner.seconds = time.perf_counter() - started
    return runner


def _best(function: Function, inputs: Inputs, device: torch.device, calls: int) -> Runner:
    try:
        runner = Runner(Graph(function, inputs), "graph")
        expected = calls * _seconds(runner.call, inputs, device)
        if expected * COMPILE_GAIN > COMPILE_SECONDS:
            runner = _compiled(function, inputs, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a network that waits for the host, or that the compiler does not take
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Runner(function, "eager", note=f"running without a CUDA graph: {reason}")
    return runner


def _seconds(call: Function, inputs: Inputs, device: torch.device) -> float:
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    call(*inputs)
    torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _compiled(function: Function, inputs: Inputs, device: torch.device) -> Runner:
    """By torch.compile as one graph of torch, on CUDA captured as one of CUDA."""
    function(*inputs)  # numbers that are looked up once are there when it is traced
    compiled: Function = torch.compile(function, fullgraph=True, dynamic=False)
    compiled(*inputs)
    if device.type != "cuda":
        return Runner(compiled, "compile")
    return Runner(Graph(compiled, inputs), "compile and graph")


class Graph:
    """One CUDA graph of a function: a call copies its inputs in, replays it, and copies its outputs out."""

    def __init__(self, function: Function, inputs: Inputs) -> None:
        self.inputs = tuple(None if x is None else x.clone() for x in inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what libraries set up at a first call must not be captured
            for _ in range(2):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        for mine, given in zip(self.inputs, inputs, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given, non_blocking=True)
        self.graph.replay()
        return tuple(x.clone() for x in self.outputs)


def fitting(run: Callable[[int], object], batch: int) -> int:
    """The largest of batch, batch / 2, batch / 4, ... for which run(batch) finds memory; 0 for none."""
    while batch:
        try:
            run(batch)
        except torch.OutOfMemoryError:
            batch //= 2
        else:
            break
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return batch
