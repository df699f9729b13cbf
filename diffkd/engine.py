"""The training loop of a stage on accelerate: accumulation, EMA, learning rate, checkpoints, log."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from pydantic import Field
from torch import Tensor, nn

from diffkd.base import Strict, UserError
from diffkd.data import Images
from diffkd.denoiser import Denoiser
from diffkd.meter import Meter
from diffkd.method import Batch, Loss, Method, Stage
from diffkd.prefetch import ahead
from diffkd.runs import Run

Beta = Annotated[float, Field(ge=0, lt=1)]
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
COMPILER = "inductor"


class Training(Strict):
    """How any method is trained."""

    batch_size: int = Field(
        128, ge=1, description="images of one update, over all processes and micro-batches"
    )
    micro_batches: int | None = Field(
        None,
        ge=1,
        description="parts that a batch is split into, over all processes; default one per process",
    )
    ema: float = Field(
        0.99, ge=0, lt=1, description="decay of the weights' moving average, which is what is kept"
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="of AdamW")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="gradients are clipped to this norm; null for never"
    )
    precision: Literal["float32", "bf16", "fp16"] = Field(
        "float32", description="autocast of the student, dtype of the others; float32 is TF32 on CUDA"
    )
    compile: bool = Field(False, description="torch.compile of the networks, on CUDA; takes minutes")
    gradient_checkpointing: bool = Field(
        False, description="computes activations twice instead of keeping them: less memory, more time"
    )
    log_every: int = Field(10, ge=1, description="updates between records of log.jsonl")
    checkpoint_every: int = Field(100, ge=1, description="updates between checkpoints")

    def parts(self, processes: int) -> int:
        """Micro-batches of one update. Raises UserError where they do not spread evenly."""
        parts = self.micro_batches or processes
        if parts % processes or self.batch_size % parts:
            raise UserError(
                f"training.batch_size {self.batch_size} in {parts} micro-batches does not spread evenly over "
                f"{processes} processes; micro_batches must divide the batch and {processes} divide them"
            )
        return parts


class Interrupted(Exception):
    """The user asked to stop; a checkpoint was saved."""


def derived_seed(*parts: int) -> int:
    """A 63-bit seed from (seed, stage, update, micro-batch): nearby numbers give unrelated ones."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass
class Learner:
    """One trained network, prepared by accelerate, with its optimizer."""

    network: nn.Module
    optimizer: Any
    params: list[nn.Parameter] = field(init=False)  # that learn

    def __post_init__(self) -> None:
        self.params = [p for p in self.network.parameters() if p.requires_grad]


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
    trained. on_update: called with the number of updates done and the last log record. Raises NonFinite,
    Interrupted.
    """
    for net in nets.values():
        _prepare(accelerator, net, training)
    learners = {
        name: _learner(accelerator, net, stage, training) for name, net in nets.items() if _is_trained(net)
    }
    averaged = list(learners["student"].network.parameters())
    ema = EMAModel(averaged, decay=training.ema, foreach=True)
    ema.to(dtype=torch.float32)
    done = _restore(accelerator, run, stage_index, learners, ema)
    if accelerator.is_main_process:
        run.rewind_log(stage_index, done)
    meter = Meter(accelerator.device)
    record: dict[str, Any] = {}
    prepared: Iterator[list[tuple[torch.Generator, Batch]]] = (
        _micro_batches(accelerator, images, nets["student"], training, (seed, stage_index, update))
        for update in range(done, stage.updates)
    )
    if accelerator.device.type != "cpu":  # whose cores have nothing else to do
        prepared = ahead(prepared)
    for update in range(done, stage.updates):
        for learner in learners.values():
            for group in learner.optimizer.param_groups:
                group["lr"] = stage.rate(update)
        runs = [(rng, method.losses(nets, batch, stage, rng)) for rng, batch in next(prepared)]
        _update(accelerator, runs, learners, training, meter, update)
        method.after_update(nets, stage)
        ema.step(averaged)
        done = update + 1
        last = done == stage.updates
        if done % training.log_every == 0 or last:
            record = meter.read(accelerator, training.batch_size)
            meter.check(stage.name)
            place = {"stage": stage.name, "stage_index": stage_index, "update": done}
            record = {**place, "updates": stage.updates, "learning_rate": stage.rate(update), **record}
            if accelerator.is_main_process:
                run.append(record)
        on_update(done, record)
        stopping = should_stop()
        if (done % training.checkpoint_every == 0 or stopping) and not last:
            meter.check(stage.name)
            if accelerator.is_main_process:
                _save(accelerator, run, stage_index, done, learners, ema)
        if stopping and not last:
            raise Interrupted
    ema.copy_to(averaged)
    for net in nets.values():
        if isinstance(net, Denoiser):
            net.network = accelerator.unwrap_model(net.network)
    accelerator.free_memory()


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


def _learner(accelerator: Accelerator, net: nn.Module, stage: Stage, training: Training) -> Learner:
    """The network prepared in place: inside a Denoiser, whose own methods stay reachable."""
    network = accelerator.prepare(net.network if isinstance(net, Denoiser) else net)
    if isinstance(net, Denoiser):
        net.network = network
    optimizer = torch.optim.AdamW(
        [p for p in network.parameters() if p.requires_grad],
        lr=stage.learning_rate,
        betas=training.betas,
        weight_decay=training.weight_decay,
        fused=accelerator.device.type in ("cuda", "cpu"),
    )
    return Learner(network, accelerator.prepare(optimizer))


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
        rng = torch.Generator().manual_seed(derived_seed(*key, micro))
        x0, labels = images.batch(training.batch_size // parts, rng)
        cond = {}
        if getattr(student, "num_classes", None) is not None and labels is not None:
            cond["class_labels"] = labels
        batches.append((rng, Batch(x0, cond).to(accelerator.device)))
    return batches


def _update(
    accelerator: Accelerator,
    runs: list[tuple[torch.Generator, Iterator[Loss]]],
    learners: Mapping[str, Learner],
    training: Training,
    meter: Meter,
    update: int,
) -> None:
    """One update: the micro-batches' generators in step, each loss summed before its network moves."""
    while True:
        losses = []
        for k, (_, generator) in enumerate(runs):
            with ExitStack() as stack:
                if k + 1 < len(runs):  # gradients are exchanged once, with the last micro-batch
                    for learner in learners.values():
                        stack.enter_context(accelerator.no_sync(learner.network))
                with accelerator.autocast():
                    loss = next(generator, None)
                if loss is None:
                    break
                accelerator.backward(loss.value / len(runs), inputs=learners[loss.network].params)
                losses.append(loss)
        if not losses:
            return
        learner = learners[losses[0].network]
        norm = accelerator.clip_grad_norm_(learner.params, training.max_grad_norm or float("inf"))
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        meter.add(losses, norm, update)


def _save(
    accelerator: Accelerator,
    run: Run,
    stage_index: int,
    done: int,
    learners: Mapping[str, Learner],
    ema: EMAModel,
) -> None:
    tensors: dict[str, dict[str, Tensor]] = {}
    state: dict[str, Any] = {"ema_step": ema.optimization_step}
    for name, learner in learners.items():
        network = accelerator.unwrap_model(learner.network)
        tensors[name] = dict(network.state_dict())
        tensors[f"{name}-optimizer"] = {
            f"{index}.{key}": value
            for index, values in learner.optimizer.state_dict()["state"].items()
            for key, value in values.items()
        }
    tensors["ema"] = {str(index): value for index, value in enumerate(ema.shadow_params)}
    run.save_checkpoint(stage_index, done, tensors, state)


def _restore(
    accelerator: Accelerator, run: Run, stage_index: int, learners: Mapping[str, Learner], ema: EMAModel
) -> int:
    """Loads the stage's newest checkpoint; the number of updates done, 0 where there is none."""
    found = run.load_checkpoint(stage_index)
    if found is None:
        return 0
    done, tensors, state = found
    for name, learner in learners.items():
        accelerator.unwrap_model(learner.network).load_state_dict(tensors[name])
        saved = learner.optimizer.state_dict()
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors[f"{name}-optimizer"].items():
            index, _, field = key.partition(".")
            moments.setdefault(int(index), {})[field] = value
        learner.optimizer.load_state_dict({"state": moments, "param_groups": saved["param_groups"]})
    for position, shadow in enumerate(ema.shadow_params):
        shadow.copy_(tensors["ema"][str(position)])
    ema.optimization_step = state["ema_step"]
    return done
