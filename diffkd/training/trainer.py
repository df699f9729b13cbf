"""The training loop of one stage: updates, EMA, checkpoints, log; resumable at every update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from diffkd.core.classifier import Model
from diffkd.data.images import Examples
from diffkd.errors import Interrupted, Unfinished
from diffkd.io.prefetch import prefetch
from diffkd.methods.base import Batch, Method, Stage, Step
from diffkd.training.config import Training
from diffkd.training.divergence import describe_nonfinite, nonfinite_examples
from diffkd.training.run_folder import RunFolder
from diffkd.training.state import prepare, restore, save
from diffkd.training.update import micro_batches, run_update


def run_stage(
    accelerator: Accelerator,
    method: Method,
    stage: Stage,
    nets: Mapping[str, nn.Module],
    images: Examples,
    training: Training,
    run: RunFolder,
    *,
    seed: int,
    stage_index: int,
    on_update: Callable[[int, dict[str, Any]], None] = lambda update, record: None,
    on_checkpoint: Callable[[Path], None] = lambda path: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Trains one stage, from its last checkpoint if there is one; leaves the averaged weights in nets.

    nets: "student", "teacher" and what the method adds; those with parameters that require gradients are
    trained. on_update: called with the number of updates done and the last log record. on_checkpoint: called
    in the main process with each checkpoint, once it is whole. should_stop: asked after each update; if it
    is true in one process, all stop. Raises NonFinite, Interrupted, Unfinished.
    """
    state = prepare(accelerator, nets, stage, training)
    done = restore(accelerator, run, stage_index, state)
    if accelerator.is_main_process:
        run.rewind_log(stage_index, done)
    batches: Iterator[list[tuple[torch.Generator, Batch]]] = (
        micro_batches(accelerator, images, nets["student"], training, (seed, stage_index, update))
        for update in range(done, stage.updates)
    )
    if accelerator.device.type != "cpu":  # on CPU, prefetching would compete with training
        batches = prefetch(batches)
    place = {"stage": stage.name, "stage_index": stage_index}
    record: dict[str, Any] = {}
    try:
        for update in range(done, stage.updates):
            step = Step(stage, update)
            for name, learner in state.learners.items():
                learner.set_rate(stage.rate(update, name))
            parts = [(rng, method.losses(nets, batch, step, rng)) for rng, batch in next(batches)]
            with torch.random.fork_rng([accelerator.device] if accelerator.device.type == "cuda" else []):
                outcome = run_update(accelerator, parts, state, should_stop)
            done = update + 1
            if outcome.nonfinite is None:
                state.monitor.completed(outcome.loss, done, warn=accelerator.is_main_process)
                method.after_update(nets, step)
            for name, learner in state.learners.items():
                if name in outcome.updated:
                    learner.update_average()
            if outcome.nonfinite is not None and outcome.counts:
                key = (seed, stage_index, update)
                examples = nonfinite_examples(accelerator, outcome.nonfinite, images, training, key)
                if accelerator.is_main_process:
                    run.append({"event": "skipped", **place, "update": done, **examples})
                state.monitor.skipped(describe_nonfinite(stage.name, done, examples))
            last = done == stage.updates
            if (done % training.log_every == 0 or last) and state.log.has_any:
                means = state.log.read(accelerator, training.batch_size)
                record = {**place, "update": done, "updates": stage.updates, **_rates(step), **means}
                if accelerator.is_main_process:
                    run.append(record)
            on_update(done, record)
            run.checkpoints.check()
            _tell(run, on_checkpoint)
            if (done % training.checkpoint_every == 0 or outcome.stop) and not last:
                save(accelerator, run, stage_index, done, state)
                if outcome.stop:
                    run.checkpoints.wait()
                    _tell(run, on_checkpoint)
                    accelerator.wait_for_everyone()  # a launcher ends the other processes once one has exited
                    raise Interrupted(saved=True)
        run.checkpoints.wait()
        _tell(run, on_checkpoint)
    except Exception:
        with suppress(Unfinished):  # the last checkpoint is completed, and the first error raised
            run.checkpoints.wait()
        raise
    for name, learner in state.learners.items():
        network, net = learner.finish(), nets[name]
        if isinstance(net, Model):
            net.network = network
    accelerator.free_memory()


def _tell(run: RunFolder, on_checkpoint: Callable[[Path], None]) -> None:
    for path in run.checkpoints.written():
        on_checkpoint(path)


def _rates(step: Step) -> dict[str, float]:
    """The student's learning rate, and those of the networks that the stage names."""
    others = [name for name in step.stage.networks if name != "student"]
    rates = {f"{name}_learning_rate": step.stage.rate(step.update, name) for name in others}
    return {"learning_rate": step.stage.rate(step.update), **rates}
