"""Running a function of fixed shapes: eagerly, as one CUDA graph, or compiled and then captured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffkd.errors import UserError
from diffkd.io.text import reason

Mode = Literal["auto", "eager", "graph", "compile"]
MODES: tuple[str, ...] = ("auto", "eager", "graph", "compile")
Inputs = tuple[Tensor, ...]
Function = Callable[..., tuple[Tensor, ...]]
# The cost and gain of compilation that `auto` assumes; not measured on a GPU.
COMPILE_SECONDS = 60.0
COMPILE_GAIN = 0.2


@dataclass
class Runner:
    """A function ready to be called. path: how it runs, for the user to read. seconds: spent on warm-up,
    capture and compilation. note: why a faster path could not be taken."""

    call: Function
    path: str
    seconds: float = 0.0
    note: str | None = None

    @property
    def fixed_shape(self) -> bool:
        """Whether every call must have the shapes that it was prepared with."""
        return self.path != "eager"


def check_mode(mode: str, device: torch.device) -> None:
    """Raises UserError for a mode that is unknown, or not available on this device."""
    if mode not in MODES:
        raise UserError(f"mode {mode!r} is unknown; use one of {', '.join(MODES)}")
    if mode == "graph" and device.type != "cuda":
        raise UserError(
            f"mode graph captures a CUDA graph, and the device is {device.type}; use eager or auto"
        )


def prepare(function: Function, inputs: Inputs, mode: str, device: torch.device, calls: int) -> Runner:
    """Prepares a function for `calls` calls with tensors shaped like inputs.

    Off CUDA it runs eagerly unless mode is `compile`. On CUDA it is warmed up, so that torch.OutOfMemoryError
    is raised here if at all. `auto` captures a graph, compiles it where that pays off over this many calls,
    and runs eagerly where capturing fails.
    """
    check_mode(mode, device)
    if device.type != "cuda" and mode in ("auto", "eager"):
        return Runner(function, "eager")
    started = time.perf_counter()
    if mode in ("compile", "graph"):
        try:
            made = _compiled(function, inputs, device) if mode == "compile" else None
            runner = made or Runner(Graph(function, inputs), "graph")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler, or what torch cannot compile or capture
            raise UserError(f"mode {mode} fails here ({reason(error)}); use eager or auto") from error
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
    except Exception as error:  # a network that synchronizes with the host, or cannot be compiled
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
    """One graph by torch.compile, on CUDA captured as a CUDA graph too."""
    function(*inputs)  # fills caches of numbers before tracing
    compiled: Function = torch.compile(function, fullgraph=True, dynamic=False)
    compiled(*inputs)
    if device.type != "cuda":
        return Runner(compiled, "compile")
    return Runner(Graph(compiled, inputs), "compile and graph")


class Graph:
    """A function as one CUDA graph: a call copies the inputs in, replays it, and copies the outputs out."""

    def __init__(self, function: Function, inputs: Inputs) -> None:
        self.inputs = tuple(x.clone() for x in inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what libraries set up in their first calls must not be captured
            for _ in range(2):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for static, given in zip(self.inputs, inputs, strict=True):
            static.copy_(given, non_blocking=True)
        self.graph.replay()
        return tuple(x.clone() for x in self.outputs)


def largest_fitting(run: Callable[[int], object], batch: int) -> int:
    """The largest of batch, batch / 2, batch / 4, ... for which run(batch) fits into memory; 0 for none."""
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
