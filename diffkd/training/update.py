"""One update: the micro-batches of each process in step, one wait for the device and the other processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffkd.core.denoiser import GUIDANCE
from diffkd.core.noise import derived_seed, generator_for
from diffkd.data.images import Examples
from diffkd.io.prefetch import to_host
from diffkd.methods.base import Batch, Loss
from diffkd.training.config import Training
from diffkd.training.state import StageState


def micro_batches(
    accelerator: Accelerator,
    images: Examples,
    student: nn.Module,
    training: Training,
    key: tuple[int, int, int],
) -> list[tuple[torch.Generator, Batch]]:
    """This process's parts of one update, each with the generator of all its random numbers.

    key: (seed, stage, update).
    """
    processes, rank = accelerator.num_processes, accelerator.process_index
    parts = training.parts(processes)
    share = parts // processes
    batches = []
    for micro in range(rank * share, (rank + 1) * share):
        rng = generator_for(key, micro)
        x0, cond, *noise = images.batch(training.batch_size // parts, rng)
        if getattr(student, "num_classes", None) is None:
            cond.pop("class_labels", None)
        if (weights := getattr(student, "guidance_range", None)) is not None:
            least, largest = weights
            cond[GUIDANCE] = least + (largest - least) * torch.rand(len(x0), generator=rng)
        batches.append((rng, Batch(x0, cond, *noise).to(accelerator.device)))
    return batches


@dataclass(frozen=True)
class Outcome:
    """What an update did.

    loss: the student's, averaged over all processes. updated: the networks that were. stop: whether any
    process was asked to stop. nonfinite: this process's losses for which the value or a gradient, of any
    process, was NaN or infinite; the update ended with them. counts: whether it counts towards the limit of
    skipped updates in a row.
    """

    loss: float
    updated: set[str]
    stop: bool
    nonfinite: list[Loss] | None = None
    counts: bool = True


def run_update(
    accelerator: Accelerator,
    parts: list[tuple[torch.Generator, Iterator[Loss]]],
    state: StageState,
    should_stop: Callable[[], bool],
) -> Outcome:
    """Advances the micro-batches' losses together: each is summed over all before its network is updated."""
    student_loss, updated, stop = math.nan, set[str](), False
    number = 0
    while losses := _backward(accelerator, parts, state, number):
        learner = state.learners[losses[0].network]
        norm = learner.norm()
        mean = torch.stack([loss.value.detach().float() for loss in losses]).mean()
        value, finite, asked = _agree(accelerator, mean, norm, should_stop())
        stop = stop or asked
        if not finite:
            counts = True
            if accelerator.scaler is not None:  # infinite gradients lower its scale; only then they count
                accelerator.scaler.update()
                counts = not math.isfinite(value) or accelerator.scaler.get_scale() < 1
            _clear_gradients(state)
            return Outcome(value, updated, stop, losses, counts)
        learner.step()
        if len(state.learners) > 1:
            _clear_gradients(state)
        updated.add(losses[0].network)
        if losses[0].network == "student":
            student_loss = value
        state.log.add(losses, norm)
        number += 1
    return Outcome(student_loss, updated, stop)


def _backward(
    accelerator: Accelerator,
    parts: list[tuple[torch.Generator, Iterator[Loss]]],
    state: StageState,
    number: int,
) -> list[Loss]:
    """The next loss of every micro-batch, its gradients added up; [] after the last. number: of the loss."""
    losses = []
    for k, (rng, generator) in enumerate(parts):
        with ExitStack() as stack:
            if k + 1 < len(parts):  # gradients are exchanged once, with the last micro-batch
                for learner in state.learners.values():
                    stack.enter_context(learner.accumulating())
            torch.manual_seed(
                derived_seed(rng.initial_seed(), number)
            )  # for layers that draw, as dropout does
            with accelerator.autocast():
                loss = next(generator, None)
            if loss is None:
                break
            state.learners[loss.network].backward(loss.value / len(parts))
            losses.append(loss)
    return losses


def _clear_gradients(state: StageState) -> None:
    for learner in state.learners.values():
        learner.clear_gradients()


def _agree(accelerator: Accelerator, loss: Tensor, norm: Tensor, stop: bool) -> tuple[float, bool, bool]:
    """The mean loss over processes, whether loss and gradients are finite in all, whether any is to stop.

    The one wait of an update for the device, and of a process for the others.
    """
    values = torch.stack([loss, norm.to(loss.dtype), torch.full_like(loss, float(stop))])
    if accelerator.num_processes > 1:
        values = accelerator.reduce(values, reduction="mean")
    value, gradient, asked = to_host(values)
    return value, math.isfinite(value) and math.isfinite(gradient), asked > 0
