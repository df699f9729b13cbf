"""A student's network as one function of tensors, traced by torch.export for batches of any size."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.core import denoiser as denoisers
from diffkd.core.denoiser import GUIDANCE, Call, Denoiser
from diffkd.errors import UserError
from diffkd.io.text import reason
from diffkd.models import saving
from diffkd.models.exports import Student, batched
from diffkd.models.masked_prompts import MASK

BATCH = "batch"  # the size that is free
SAMPLE, TIME, OUTPUT = "sample", "timestep", "output"  # names of inputs and output, after which `cond` comes
TRACED = 2  # images: of one, torch takes the batch for a constant
TRIED = 3  # images, of another batch than the one that was traced
MOST = 1 << 12  # images a batch
MOST_ENLARGED = 63  # of UNets of diffusers, which treat larger batches otherwise


class Program(nn.Module):
    """(B, C, H, W), (B,) float32, conditioning, each (B, ...) -> (B, C, H, W), as a stock scheduler takes it.

    The time is the one that the scheduler gives its network, of a student's own the numbers in its
    `timesteps`. A network that is preconditioned is taken as it is: its stock scheduler does that.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        network = batched.of(denoiser)
        self.network = denoiser.network if network is None else network
        self.function = function_of(denoiser) if network is None else batched.call

    def forward(self, sample: Tensor, timestep: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        return sample_of(self.function(self.network, sample, timestep, cond or {}))


def function_of(denoiser: Denoiser) -> Call:
    """The stock network's own function, of its scheduler's time."""
    return denoisers.call if denoiser.preconditioned else denoiser.call


def sample_of(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    return found


def fits(student: Student) -> bool:
    family = saving.family_saving(student.denoiser)
    return family is not None


def inputs_of(denoiser: Denoiser, count: int, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Random ones for so many images: states, times in the middle, and conditioning."""
    rng = torch.Generator().manual_seed(seed)
    x, _, cond = denoiser.example_inputs()
    x = torch.randn(count, *x.shape[1:], generator=rng)
    t = torch.linspace(0.9, 0.3, count, dtype=torch.float64)
    time = denoiser.schedule.network_time(t, x)
    made = {}
    for key, value in cond.items():
        value = value.repeat(count, *[1] * (value.ndim - 1))
        if key == MASK:  # prompts of several lengths, each odd
            value = torch.ones_like(value)
            for row in range(count):
                value[row, value.shape[1] * (row + 1) // (count + 1) | 1 :] = 0
        plain = value.is_floating_point() and not value.any()  # such as the zeros of an embedding
        made[key] = torch.randn(value.shape, generator=rng) if plain else value
    return x, time, made


def named(sample: Tensor, time: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
    """As arguments of a program."""
    return {SAMPLE: sample, TIME: time, **({"cond": cond} if cond else {})}


def most_of(student: Student) -> int:
    """Images a batch, at most."""
    enlarges = any(type(module).__name__ == "Upsample2D" for module in student.denoiser.network.modules())
    return MOST_ENLARGED if enlarges else MOST


@torch.no_grad()
def traced(student: Student) -> torch.export.ExportedProgram:
    """Raises UserError where torch cannot trace the network."""
    program = Program(student.denoiser).eval().requires_grad_(False)
    sample, time, cond = inputs_of(student.denoiser, TRACED)
    batch = torch.export.Dim(BATCH, min=1, max=most_of(student))
    shapes = {
        SAMPLE: {0: batch},
        TIME: {0: batch},
        **({"cond": {key: {0: batch} for key in cond}} if cond else {}),
    }
    try:
        with silent():
            found = torch.export.export(program, (), named(sample, time, cond), dynamic_shapes=shapes)
    except Exception as error:  # torch raises many types
        kind = type(student.denoiser.network).__name__.removeprefix("Fast")
        raise UserError(
            f"{student.name} is a {kind} that torch {torch.__version__} cannot trace ({reason(error)}); hand "
            "on its folder, or --to fp16"
        ) from error
    for module in found.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)  # which names the folders of this machine
    return found


@torch.no_grad()
def check_same(student: Student, run: Callable[..., Tensor], bound: float) -> None:
    """Raises UserError where what was written computes something else than the network. run: as `Program`.
    bound: of the difference, in units of the largest output."""
    denoiser = student.denoiser
    sample, time, cond = inputs_of(denoiser, TRIED, seed=1)
    own = sample_of(function_of(denoiser)(denoiser.network, sample, time, cond))
    difference = (run(**named(sample, time, cond)) - own).abs().max() / own.abs().max()
    if not difference <= bound:
        raise UserError(
            f"{student.name}: what was written differs from its network by {difference:.1e} of the largest "
            f"output, more than {bound:g}; please report it with the versions of torch and of the reader"
        )


def write_beside(student: Student, folder: Path) -> dict[str, Any]:
    """The scheduler, into a folder with a program. Returns what the card says of such a folder."""
    scheduler = saving.stock_scheduler(student.denoiser)
    scheduler.save_pretrained(folder / "scheduler")
    sample, time, cond = inputs_of(student.denoiser, 1)
    shapes = {key: [BATCH, *value.shape[1:]] for key, value in {SAMPLE: sample, TIME: time, **cond}.items()}
    kinds = {key: str(value.dtype).removeprefix("torch.") for key, value in cond.items()}
    return {
        "inputs": shapes,
        "dtypes": {SAMPLE: "float32", TIME: "float32", **kinds},
        "most": most_of(student),
        **({"guidance": student.denoiser.usual_guidance} if GUIDANCE in cond else {}),
        "scheduler": type(scheduler).__name__,
        "handed": bool(getattr(student.denoiser.schedule, "handed", False)),
    }


@contextmanager
def silent() -> Iterator[None]:
    """Without the warnings, the log and the prints of torch, which are of its own code and of diffusers'."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    nowhere = io.StringIO()
    try:
        with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
