"""The training loop of a stage on accelerate: accumulation, EMA, learning rate, checkpoints, log."""

from __future__ import annotations

import hashlib
import time
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
from diffkd.method import Batch, Loss, Method, Stage
from diffkd.prefetch import ahead
from diffkd.runs import Run, peak_rss

Beta = Annotated[float, Field(ge=0, lt=1)]
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
COMPILER = "inductor"
KEPT = 64  # updates whose losses wait to be added up
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
    meter = _Meter(accelerator.device)
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
    """What an interval of the log sums up. It is kept as it comes, on the device, and added up once read: an
    update costs nothing for it, and the host is not stopped."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bad = torch.full((2,), -1.0, dtype=torch.float64)  # update and t of the first bad loss
        self.sums: dict[str, Tensor] = {}
        self._restart()

    def _restart(self) -> None:
        self.sums = {}
        self.kept: list[tuple[int, list[Loss], Tensor | None]] = []
        self.started = time.perf_counter()
        self.updates = 0

    def add(self, losses: list[Loss], norm: Tensor | None, update: int) -> None:
        self.updates += losses[0].network == "student"
        losses = [Loss(loss.network, loss.value.detach(), loss.metrics) for loss in losses]
        self.kept.append((update, losses, None if norm is None else norm.detach()))
        if len(self.kept) >= KEPT:
            self._add_up()

    def _add_up(self) -> None:
        """The kept losses into the sums, those of one kind together. The one wait for the device."""
        kinds: dict[str, list[tuple[int, Loss]]] = {}
        for update, losses, norm in self.kept:
            prefix = "" if losses[0].network == "student" else f"{losses[0].network}_"
            if norm is not None:
                self._sum(f"{prefix}grad_norm", _total(norm[None]))
            for loss in losses:
                kinds.setdefault(prefix, []).append((update, loss))
        self.kept = []
        for prefix, found in kinds.items():
            values = torch.stack([loss.value for _, loss in found])
            self._sum(f"{prefix}loss", _total(values))
            for (update, loss), fine in zip(found, values.isfinite().tolist(), strict=True):
                if not fine and self.bad[0] < 0:
                    self.bad = torch.tensor([update + 1.0, _worst(loss)], dtype=torch.float64)
            for key in found[0][1].metrics:
                if key != "t":
                    metrics = [loss.metrics for _, loss in found]
                    t = torch.cat([m["t"] if "t" in m else torch.zeros_like(m[key]) for m in metrics])
                    self._sum(f"{prefix}{key}_by_noise", _binned(t, torch.cat([m[key] for m in metrics])))

    def _sum(self, key: str, value: Tensor) -> None:
        self.sums[key] = self.sums[key] + value if key in self.sums else value

    def read(self, accelerator: Accelerator, training: Training) -> dict[str, Any]:
        """The means of the interval, and a new one begins."""
        self._add_up()
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
        record["peak_memory_gb"] = round(_peak_memory(self.device), 3)
        self._restart()
        return record

    def check(self, stage: str) -> None:
        self._add_up()
        update, t = self.bad.tolist()
        if update >= 0:
            raise NonFinite(
                f"the loss of stage {stage} became NaN or infinite at update {int(update)}, "
                f"noise level t = {t:.4g}; lower method.learning_rate (the last good checkpoint is kept)"
            )


def _total(values: Tensor) -> Tensor:
    """Sum and count, (2,) float64."""
    values = values.detach().double()
    return torch.stack([values.sum(), torch.ones_like(values).sum()])


def _binned(t: Tensor, values: Tensor) -> Tensor:
    """Sums and counts, (2, NOISE_BINS) float64, of values at noise levels t."""
    bins = ((t.double() * NOISE_BINS).ceil().long() - 1).clamp(0, NOISE_BINS - 1)
    binned = torch.zeros(2, NOISE_BINS, dtype=torch.float64, device=values.device)
    binned[0].index_add_(0, bins, values.detach().double())
    binned[1].index_add_(0, bins, torch.ones_like(values, dtype=torch.float64))
    return binned


def _worst(loss: Loss) -> float:
    """The noise level of a bad loss's worst example, 0 where it does not say."""
    t = loss.metrics.get("t")
    if t is None or len(t) == 0:
        return 0.0
    return float(t[int(loss.metrics.get("loss", t).nan_to_num(nan=torch.inf).argmax())])


def _peak_memory(device: torch.device) -> float:
    """GB: allocated on the device, or where that is this very machine's, of the process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return peak_rss() / 1e9


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
