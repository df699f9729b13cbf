"""The training loop of a stage on accelerate: accumulation, EMA, learning rate, checkpoints, log."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from diffkd.base import Interrupted, Unfinished, UserError
from diffkd.data import Images
from diffkd.denoiser import Denoiser
from diffkd.learner import Copies, Learner, Shards, fill, whole
from diffkd.meter import NOISE_BINS, Meter, noise_bin
from diffkd.method import Batch, Loss, Method, Stage
from diffkd.prefetch import ahead, read
from diffkd.runs import Run
from diffkd.training import Training
from diffkd.watch import Watch
from diffkd.zero import Zero

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
COMPILER = "inductor"
KINDS: dict[DistributedType, type[Learner]] = {DistributedType.FSDP: Shards, DistributedType.DEEPSPEED: Zero}


def derived_seed(*parts: int) -> int:
    """A 63-bit seed from (seed, stage, update, micro-batch): nearby numbers give unrelated ones."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass
class Work:
    """What a stage changes, and a checkpoint keeps. targets: networks that do not learn and are not the
    teacher; a method may move them."""

    learners: dict[str, Learner]
    targets: dict[str, nn.Module]
    ema: EMAModel
    meter: Meter
    watch: Watch


def run_stage(
    accelerator: Accelerator,
    method: Method,
    stage: Stage,
    nets: Mapping[str, nn.Module],
    images: Images,
    training: Training,
    run: Run,
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
    work = _work(accelerator, nets, stage, training)
    averaged = list(work.learners["student"].network.parameters())
    done = _restore(accelerator, run, stage_index, work)
    if accelerator.is_main_process:
        run.rewind_log(stage_index, done)
    record: dict[str, Any] = {}
    place = {"stage": stage.name, "stage_index": stage_index}
    prepared: Iterator[list[tuple[torch.Generator, Batch]]] = (
        _micro_batches(accelerator, images, nets["student"], training, (seed, stage_index, update))
        for update in range(done, stage.updates)
    )
    if accelerator.device.type != "cpu":  # whose cores have nothing else to do
        prepared = ahead(prepared)
    try:
        for update in range(done, stage.updates):
            for learner in work.learners.values():
                learner.rate(stage.rate(update))
            runs = [(rng, method.losses(nets, batch, stage, rng)) for rng, batch in next(prepared)]
            outcome = _update(accelerator, runs, work, should_stop)
            done = update + 1
            if outcome.bad is None:
                work.watch.good(outcome.loss, done, speaks=accelerator.is_main_process)
                method.after_update(nets, stage)
                work.ema.step(averaged)
            elif outcome.counts:
                bad = _bad(accelerator, outcome.bad, images, training, (seed, stage_index, update))
                if accelerator.is_main_process:
                    run.append({"event": "skipped", **place, "update": done, **bad})
                work.watch.bad(_said(stage.name, done, bad))
            last = done == stage.updates
            if (done % training.log_every == 0 or last) and work.meter.has_any:
                record = work.meter.read(accelerator, training.batch_size)
                record = {"updates": stage.updates, "learning_rate": stage.rate(update), **record}
                record = {**place, "update": done, **record}
                if accelerator.is_main_process:
                    run.append(record)
            on_update(done, record)
            run.checkpoints.check()
            if (done % training.checkpoint_every == 0 or outcome.stop) and not last:
                _save(accelerator, run, stage_index, done, work)
                if outcome.stop:
                    run.checkpoints.wait()
                    raise Interrupted
        run.checkpoints.wait()
    except Exception:
        with suppress(Unfinished):  # what was good is kept; what went wrong first is told
            run.checkpoints.wait()
        raise
    for name, net in nets.items():
        if isinstance(net, Denoiser) and name in work.learners:
            shadow = work.ema.shadow_params
            learner = work.learners[name]
            net.network = learner.trained(shadow) if name == "student" else learner.bare
    accelerator.free_memory()


def _work(accelerator: Accelerator, nets: Mapping[str, nn.Module], stage: Stage, training: Training) -> Work:
    """The networks prepared in place: inside a Denoiser, whose own methods stay reachable."""
    trained = [name for name, net in nets.items() if _is_trained(net)]
    for net in nets.values():
        _prepare(accelerator, net, training)
    kind = KINDS.get(accelerator.distributed_type, Copies)
    learners = {}
    for name in trained:
        net = nets[name]
        network = net.network if isinstance(net, Denoiser) else net
        learners[name] = kind(accelerator, network, training, stage.learning_rate, alone=len(trained) == 1)
        if isinstance(net, Denoiser):
            net.network = learners[name].network
    ema = EMAModel(list(learners["student"].network.parameters()), decay=training.ema, foreach=True)
    ema.to(dtype=torch.float32)
    targets = {name: net for name, net in nets.items() if name not in (*trained, "teacher")}
    return Work(learners, targets, ema, Meter(accelerator.device), Watch(stage.name, training.max_skipped))


def _is_trained(net: nn.Module) -> bool:
    return any(p.requires_grad for p in net.parameters())


def _prepare(accelerator: Accelerator, net: nn.Module, training: Training) -> None:
    """On the device and in the dtype that it is run in; compiled where asked for."""
    network: Any = net.network if isinstance(net, Denoiser) else net
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
        rng = _generator(key, micro)
        x0, labels = images.batch(training.batch_size // parts, rng)
        cond = {}
        if getattr(student, "num_classes", None) is not None and labels is not None:
            cond["class_labels"] = labels
        batches.append((rng, Batch(x0, cond).to(accelerator.device)))
    return batches


def _generator(key: tuple[int, int, int], micro: int) -> torch.Generator:
    """Of one micro-batch. key: (seed, stage, update)."""
    return torch.Generator().manual_seed(derived_seed(*key, micro))


@dataclass(frozen=True)
class Outcome:
    """Of one update. loss: the student's, over all processes. stop: whether a process was told to. bad: the
    losses of this process, where the update was skipped, and counts: whether it is one of those in a row.
    """

    loss: float
    stop: bool
    bad: list[Loss] | None = None
    counts: bool = True


def _update(
    accelerator: Accelerator,
    runs: list[tuple[torch.Generator, Iterator[Loss]]],
    work: Work,
    should_stop: Callable[[], bool],
) -> Outcome:
    """One update: the micro-batches' generators in step, each loss summed before its network moves."""
    student, stop = math.nan, False
    while True:
        losses = []
        for k, (_, generator) in enumerate(runs):
            with ExitStack() as stack:
                if k + 1 < len(runs):  # gradients are exchanged once, with the last micro-batch
                    for learner in work.learners.values():
                        stack.enter_context(learner.accumulating())
                with accelerator.autocast():
                    loss = next(generator, None)
                if loss is None:
                    break
                work.learners[loss.network].backward(loss.value / len(runs))
                losses.append(loss)
        if not losses:
            return Outcome(student, stop)
        learner = work.learners[losses[0].network]
        norm = learner.norm()
        mean = torch.stack([loss.value.detach().float() for loss in losses]).mean()
        # the one wait of an update for the device, and of a process for the others
        loss_value, fine, told = _agreed(accelerator, mean, norm, should_stop())
        stop = stop or told
        if not fine:
            counts = True
            if accelerator.scaler is not None:  # which skips by itself, and scales less from then on
                learner.optimizer.step()
                counts = not math.isfinite(loss_value) or accelerator.scaler.get_scale() < 1
            for every in work.learners.values():
                every.forget()
            return Outcome(loss_value, stop, losses, counts)
        learner.step()
        if len(work.learners) > 1:
            for every in work.learners.values():
                every.forget()
        if losses[0].network == "student":
            student = loss_value
        work.meter.add(losses, norm)


def _agreed(accelerator: Accelerator, loss: Tensor, norm: Tensor, stop: bool) -> tuple[float, bool, bool]:
    """The mean loss over processes, whether it and the gradients are numbers in all, whether one was told to
    stop."""
    found = torch.stack([loss, norm.to(loss.dtype), loss.new_tensor(float(stop))])
    if accelerator.num_processes > 1:
        found = accelerator.reduce(found, reduction="mean")
    value, gradient, told = read(found)
    return value, math.isfinite(value) and math.isfinite(gradient), told > 0


def _bad(
    accelerator: Accelerator,
    losses: list[Loss],
    images: Images,
    training: Training,
    key: tuple[int, int, int],
) -> dict[str, Any]:
    """Which network's loss, the noise level of its worst example, and the images that it was of, over all
    processes; where no example says that it is no number, those of the whole batch."""
    parts = training.parts(accelerator.num_processes)
    first = accelerator.process_index * (parts // accelerator.num_processes)
    found: list[tuple[bool, float, int]] = []  # whether it is the culprit, t, index
    for micro, loss in enumerate(losses, first):
        indices = images.indices(training.batch_size // parts, _generator(key, micro)).tolist()
        t = loss.metrics.get("t", torch.zeros(len(indices))).tolist()
        values = loss.metrics.get("loss", torch.zeros(len(indices))).tolist()
        found += [(not math.isfinite(v), at, i) for v, at, i in zip(values, t, indices, strict=True)]
    every = gather_object(found)
    culprits = [one for one in every if one[0]] or every
    place = int(noise_bin(np.asarray(culprits[0][1])))
    return {
        "network": losses[0].network,
        "noise_bin": [place / NOISE_BINS, (place + 1) / NOISE_BINS],
        "t": culprits[0][1],
        "images": [index for _, _, index in culprits],
    }


def _said(stage: str, update: int, bad: Mapping[str, Any]) -> str:
    low, high = bad["noise_bin"]
    shown = ", ".join(map(str, bad["images"][:16])) + (", ..." if len(bad["images"]) > 16 else "")
    return (
        f"the loss or gradient of network {bad['network']} in stage {stage} became NaN or infinite at update "
        f"{update}, noise level t = {bad['t']:.4g} (bin {low:g} to {high:g}), images {shown}"
    )


def _save(accelerator: Accelerator, run: Run, stage_index: int, done: int, work: Work) -> None:
    """A copy on the host, which is written while training goes on. Every process must call it."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, learner in work.learners.items():
        found = learner.tensors()
        tensors[name], tensors[f"{name}-optimizer"] = found["network"], found["optimizer"]
    named = {name: dict(net.state_dict()) for name, net in work.targets.items()}
    named["ema"] = dict(zip(work.learners["student"].names, work.ema.shadow_params, strict=True))
    for name, values in named.items():
        copies = {key: whole(value, accelerator) for key, value in values.items()}
        tensors[name] = {key: value for key, value in copies.items() if value is not None}
    state = {
        "ema_step": work.ema.optimization_step,
        "watch": work.watch.state(),
        "meters": gather_object([work.meter.state()]),
        "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
    }
    if accelerator.is_main_process:
        run.checkpoints.save(stage_index, done, tensors, state)


def _restore(accelerator: Accelerator, run: Run, stage_index: int, work: Work) -> int:
    """Loads the stage's newest checkpoint; the number of updates done, 0 where there is none."""
    found = run.checkpoints.load(stage_index) if accelerator.is_main_process else None
    known = [None if found is None else (found.update, found.state)]
    broadcast_object_list(known)
    if known[0] is None:
        return 0
    done, state = known[0]
    try:
        _fill(accelerator, work, {} if found is None else found.tensors)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the checkpoint of stage {stage_index} does not fit the networks of this run ({error}); "
            "delete it, or use the diffkd that wrote it"
        ) from error
    work.ema.optimization_step = state["ema_step"]
    work.watch.load(state["watch"])
    work.meter.load(state["meters"], accelerator.process_index, accelerator.num_processes)
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    return int(done)


def _fill(accelerator: Accelerator, work: Work, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """tensors: of the main process."""
    for name, learner in work.learners.items():
        learner.load({"network": tensors.get(name, {}), "optimizer": tensors.get(f"{name}-optimizer", {})})
    for name, net in work.targets.items():
        fill(net.state_dict(), tensors.get(name, {}), accelerator)
    names = work.learners["student"].names
    fill(dict(zip(names, work.ema.shadow_params, strict=True)), tensors.get("ema", {}), accelerator)
