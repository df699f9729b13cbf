"""The training loop of a stage on accelerate: accumulation, EMA, learning rate, checkpoints, log."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from pydantic import Field
from torch import Tensor, nn

from diffkd.base import Strict, UserError
from diffkd.data import Images
from diffkd.denoiser import Denoiser
from diffkd.method import Batch, Loss, Method, Stage
from diffkd.runs import Run

Beta = Annotated[float, Field(ge=0, lt=1)]
NOISE_BINS = 5  # equal bins of t in the log


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
    precision: Literal["float32", "bf16", "fp16"] = Field("float32", description="autocast of the networks")
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


class NonFinite(UserError):
    """A loss that is no number any more."""


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

    @property
    def params(self) -> list[nn.Parameter]:
        return [p for p in self.network.parameters() if p.requires_grad]


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
    learners = {
        name: _learner(accelerator, net, stage, training) for name, net in nets.items() if _is_trained(net)
    }
    ema = EMAModel(learners["student"].network.parameters(), decay=training.ema, foreach=True)
    ema.to(dtype=torch.float32)
    done = _restore(accelerator, run, stage_index, learners, ema)
    if accelerator.is_main_process:
        run.rewind_log(stage_index, done)
    meter = _Meter(accelerator.device)
    record: dict[str, Any] = {}
    for update in range(done, stage.updates):
        for learner in learners.values():
            for group in learner.optimizer.param_groups:
                group["lr"] = stage.rate(update)
        batches = _micro_batches(accelerator, images, nets["student"], training, (seed, stage_index, update))
        runs = [(rng, method.losses(nets, batch, stage, rng)) for rng, batch in batches]
        _update(accelerator, runs, learners, training, meter, update)
        method.after_update(nets, stage)
        ema.step(learners["student"].network.parameters())
        done = update + 1
        last = done == stage.updates
        if done % training.log_every == 0 or last:
            record = meter.read(accelerator, training)
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
    ema.copy_to(learners["student"].network.parameters())
    for net in nets.values():
        if isinstance(net, Denoiser):
            net.network = accelerator.unwrap_model(net.network)
    accelerator.free_memory()


def _is_trained(net: nn.Module) -> bool:
    return any(p.requires_grad for p in net.parameters())


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
            cond["class_labels"] = labels.to(accelerator.device)
        batches.append((rng, Batch(x0.to(accelerator.device), cond)))
    return batches


def _update(
    accelerator: Accelerator,
    runs: list[tuple[torch.Generator, Iterator[Loss]]],
    learners: Mapping[str, Learner],
    training: Training,
    meter: _Meter,
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


class _Meter:
    """Sums of a logged interval, kept on the device: the host is not stopped at every update."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bad = torch.full(
            (2,), -1.0, dtype=torch.float64, device=device
        )  # update and t of the first bad loss
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.started = time.perf_counter()
        self.updates = 0

    def add(self, losses: list[Loss], norm: Tensor | None, update: int) -> None:
        name = losses[0].network
        prefix = "" if name == "student" else f"{name}_"
        self.updates += name == "student"
        if norm is not None:
            self._sum(
                f"{prefix}grad_norm", torch.stack([norm.detach().double(), torch.ones_like(norm).double()])
            )
        for loss in losses:
            value = loss.value.detach().double()
            self._sum(f"{prefix}loss", torch.stack([value, torch.ones_like(value)]))
            t = loss.metrics.get("t", torch.zeros(1, device=self.device)).double()
            worst = loss.metrics.get("loss", t).nan_to_num(nan=torch.inf).argmax() if len(t) > 1 else 0
            bad = torch.stack([torch.full_like(value, update + 1), t[worst]])
            self.bad = torch.where((self.bad[0] < 0) & ~value.isfinite(), bad, self.bad)
            bins = ((t * NOISE_BINS).ceil().long() - 1).clamp(0, NOISE_BINS - 1)
            for key, values in loss.metrics.items():
                if key != "t":
                    binned = torch.zeros(2, NOISE_BINS, dtype=torch.float64, device=self.device)
                    binned[0].index_add_(0, bins, values.detach().double())
                    binned[1].index_add_(0, bins, torch.ones_like(values, dtype=torch.float64))
                    self._sum(f"{prefix}{key}_by_noise", binned)

    def _sum(self, key: str, value: Tensor) -> None:
        self.sums[key] = self.sums[key] + value if key in self.sums else value

    def read(self, accelerator: Accelerator, training: Training) -> dict[str, Any]:
        """The means of the interval, and a new one begins."""
        record: dict[str, Any] = {}
        for key, value in self.sums.items():
            total, count = accelerator.reduce(value, reduction="sum").cpu()
            means = (total / count).tolist()
            if key.endswith("_by_noise"):
                record[key] = [None if n == 0 else m for m, n in zip(means, count.tolist(), strict=True)]
                whole = key.removesuffix("_by_noise")
                record.setdefault(whole, float(total.sum() / count.sum()))
            else:
                record[key] = means
        seconds = time.perf_counter() - self.started
        record["images_per_second"] = self.updates * training.batch_size / max(seconds, 1e-9)
        self.reset()
        return record

    def check(self, stage: str) -> None:
        update, t = self.bad.tolist()
        if update >= 0:
            raise NonFinite(
                f"the loss of stage {stage} became NaN or infinite at update {int(update)}, "
                f"noise level t = {t:.4g}; lower method.learning_rate (the last good checkpoint is kept)"
            )


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
