"""The training loop of a stage on accelerate: accumulation, EMA, learning rate, checkpoints, log."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from diffkd.core.classifier import Model
from diffkd.core.noise import derived_seed, generator_for
from diffkd.data.images import Images
from diffkd.errors import Interrupted, Unfinished, UserError
from diffkd.io.prefetch import prefetch, to_host
from diffkd.methods.base import Batch, Loss, Method, Stage
from diffkd.training.config import Training
from diffkd.training.divergence import DivergenceMonitor, describe_nonfinite, nonfinite_examples
from diffkd.training.learner import Copies, Learner, Shards
from diffkd.training.log import TrainingLog
from diffkd.training.run_folder import RunFolder
from diffkd.training.state import StageState, restore, save
from diffkd.training.zero import Zero

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
COMPILER = "inductor"
KINDS: dict[DistributedType, type[Learner]] = {DistributedType.FSDP: Shards, DistributedType.DEEPSPEED: Zero}


def run_stage(
    accelerator: Accelerator,
    method: Method,
    stage: Stage,
    nets: Mapping[str, nn.Module],
    images: Images,
    training: Training,
    run: RunFolder,
    *,
    seed: int,
    stage_index: int,
    on_update: Callable[[int, dict[str, Any]], None] = lambda update, record: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Trains one stage, from its last checkpoint where there is one; leaves the EMA weights in
    nets["student"].

    nets: "student", "teacher" and what the method adds; those with parameters that require gradients are
    trained. on_update: called with the number of updates done and the last log record. should_stop: asked
    after each update; one process that says so stops all. Raises NonFinite, Interrupted, Unfinished.
    """
    state = _state(accelerator, nets, stage, training)
    averaged = list(state.learners["student"].network.parameters())
    done = restore(accelerator, run, stage_index, state)
    if accelerator.is_main_process:
        run.rewind_log(stage_index, done)
    record: dict[str, Any] = {}
    place = {"stage": stage.name, "stage_index": stage_index}
    prepared: Iterator[list[tuple[torch.Generator, Batch]]] = (
        _micro_batches(accelerator, images, nets["student"], training, (seed, stage_index, update))
        for update in range(done, stage.updates)
    )
    if accelerator.device.type != "cpu":  # whose cores have nothing else to do
        prepared = prefetch(prepared)
    try:
        for update in range(done, stage.updates):
            for learner in state.learners.values():
                learner.rate(stage.rate(update))
            runs = [(rng, method.losses(nets, batch, stage, rng)) for rng, batch in next(prepared)]
            with torch.random.fork_rng([accelerator.device] if accelerator.device.type == "cuda" else []):
                outcome = _update(accelerator, runs, state, should_stop)
            done = update + 1
            if outcome.bad is None:
                state.watch.good(outcome.loss, done, speaks=accelerator.is_main_process)
                method.after_update(nets, stage)
            if outcome.moved:
                state.ema.step(averaged)
            if outcome.bad is not None and outcome.counts:
                bad = nonfinite_examples(
                    accelerator, outcome.bad, images, training, (seed, stage_index, update)
                )
                if accelerator.is_main_process:
                    run.append({"event": "skipped", **place, "update": done, **bad})
                state.watch.bad(describe_nonfinite(stage.name, done, bad))
            last = done == stage.updates
            if (done % training.log_every == 0 or last) and state.meter.has_any:
                record = state.meter.read(accelerator, training.batch_size)
                record = {"updates": stage.updates, "learning_rate": stage.rate(update), **record}
                record = {**place, "update": done, **record}
                if accelerator.is_main_process:
                    run.append(record)
            on_update(done, record)
            run.checkpoints.check()
            if (done % training.checkpoint_every == 0 or outcome.stop) and not last:
                save(accelerator, run, stage_index, done, state)
                if outcome.stop:
                    run.checkpoints.wait()
                    accelerator.wait_for_everyone()  # a launcher ends the others once one is gone
                    raise Interrupted(saved=True)
        run.checkpoints.wait()
    except Exception:
        with suppress(Unfinished):  # what was good is kept; what went wrong first is told
            run.checkpoints.wait()
        raise
    for name, net in nets.items():
        if isinstance(net, Model) and name in state.learners:
            shadow = state.ema.shadow_params
            learner = state.learners[name]
            net.network = learner.trained(shadow) if name == "student" else learner.bare
    accelerator.free_memory()


def _state(
    accelerator: Accelerator, nets: Mapping[str, nn.Module], stage: Stage, training: Training
) -> StageState:
    """The networks prepared in place: inside a Model, whose own methods stay reachable."""
    trained = [name for name, net in nets.items() if _is_trained(net)]
    for net in nets.values():
        _prepare(accelerator, net, training)
    kind = KINDS.get(accelerator.distributed_type, Copies)
    learners = {}
    for name in trained:
        net = nets[name]
        network = net.network if isinstance(net, Model) else net
        learners[name] = kind(accelerator, network, training, stage.learning_rate, alone=len(trained) == 1)
        if isinstance(net, Model):
            net.network = learners[name].network
    ema = EMAModel(list(learners["student"].network.parameters()), decay=training.ema, foreach=True)
    ema.to(dtype=torch.float32)
    followers = {name: net for name, net in nets.items() if name not in (*trained, "teacher")}
    watch = DivergenceMonitor(stage.name, training.max_skipped)
    return StageState(learners, followers, ema, TrainingLog(accelerator.device), watch)


def _is_trained(net: nn.Module) -> bool:
    return any(p.requires_grad for p in net.parameters())


def _prepare(accelerator: Accelerator, net: nn.Module, training: Training) -> None:
    """On the device and in the dtype that it is run in; compiled where asked for."""
    network: Any = net.network if isinstance(net, Model) else net
    if _is_trained(net):
        if training.gradient_checkpointing:
            if not getattr(network, "_supports_gradient_checkpointing", False):
                raise UserError(
                    f"training.gradient_checkpointing is not for a {type(network).__name__}; leave it out"
                )
            network.enable_gradient_checkpointing()
    else:
        network.to(accelerator.device, HALVES.get(training.precision))
    if accelerator.device.type == "cuda":
        network.to(memory_format=torch.channels_last)
    if training.compile:
        network.compile(backend=COMPILER, dynamic=False)  # in place: its weights keep their names


def _micro_batches(
    accelerator: Accelerator,
    images: Images,
    student: nn.Module,
    training: Training,
    key: tuple[int, int, int],
) -> list[tuple[torch.Generator, Batch]]:
    """This process's parts of one update, each with the generator that all its random numbers come from."""
    processes, rank = accelerator.num_processes, accelerator.process_index
    parts = training.parts(processes)
    share = parts // processes
    batches = []
    for micro in range(rank * share, (rank + 1) * share):
        rng = generator_for(key, micro)
        x0, labels = images.batch(training.batch_size // parts, rng)
        cond = {}
        if getattr(student, "num_classes", None) is not None and labels is not None:
            cond["class_labels"] = labels
        batches.append((rng, Batch(x0, cond).to(accelerator.device)))
    return batches


@dataclass(frozen=True)
class Outcome:
    """Of one update.

    loss: the student's, over all processes. stop: whether a process was told to. moved: whether the student
    learnt. bad: the losses of this process that were no numbers, after which nothing more was done; counts:
    whether it is one of those that may not come too often in a row.
    """

    loss: float
    stop: bool
    moved: bool
    bad: list[Loss] | None = None
    counts: bool = True


def _update(
    accelerator: Accelerator,
    runs: list[tuple[torch.Generator, Iterator[Loss]]],
    state: StageState,
    should_stop: Callable[[], bool],
) -> Outcome:
    """One update: the micro-batches' generators in step, each loss summed before its network moves."""
    student, stop, moved = math.nan, False, False
    number = -1
    while True:
        number += 1
        losses = []
        for k, (rng, generator) in enumerate(runs):
            with ExitStack() as stack:
                if k + 1 < len(runs):  # gradients are exchanged once, with the last micro-batch
                    for learner in state.learners.values():
                        stack.enter_context(learner.accumulating())
                # what layers draw themselves, as dropout does
                torch.manual_seed(derived_seed(rng.initial_seed(), number))
                with accelerator.autocast():
                    loss = next(generator, None)
                if loss is None:
                    break
                state.learners[loss.network].backward(loss.value / len(runs))
                losses.append(loss)
        if not losses:
            return Outcome(student, stop, moved)
        learner = state.learners[losses[0].network]
        norm = learner.norm()
        mean = torch.stack([loss.value.detach().float() for loss in losses]).mean()
        # the one wait of an update for the device, and of a process for the others
        loss_value, fine, asked = _agreed(accelerator, mean, norm, should_stop())
        stop = stop or asked
        if not fine:
            counts = True
            if accelerator.scaler is not None:  # it scales less from then on, where it was the gradients
                accelerator.scaler.update()
                counts = not math.isfinite(loss_value) or accelerator.scaler.get_scale() < 1
            for every in state.learners.values():
                every.forget()
            return Outcome(loss_value, stop, moved, losses, counts)
        learner.step()
        if len(state.learners) > 1:
            for every in state.learners.values():
                every.forget()
        if losses[0].network == "student":
            student, moved = loss_value, True
        state.meter.add(losses, norm)


def _agreed(accelerator: Accelerator, loss: Tensor, norm: Tensor, stop: bool) -> tuple[float, bool, bool]:
    """The mean loss over processes, whether it and the gradients are numbers in all, whether one was told to
    stop."""
    found = torch.stack([loss, norm.to(loss.dtype), torch.full_like(loss, float(stop))])
    if accelerator.num_processes > 1:
        found = accelerator.reduce(found, reduction="mean")
    value, gradient, asked = to_host(found)
    return value, math.isfinite(value) and math.isfinite(gradient), asked > 0
