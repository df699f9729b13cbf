"""The state of a stage: prepared for the processes of a run, saved to a checkpoint, restored from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn

from diffkd.core import adapters, interval
from diffkd.core.classifier import Model
from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.methods.base import Optimization, Stage
from diffkd.training.config import Training
from diffkd.training.divergence import DivergenceMonitor
from diffkd.training.learner import Copies, Learner, Shards
from diffkd.training.log import TrainingLog
from diffkd.training.run_folder import RunFolder
from diffkd.training.sharding import Stored, fill, unsharded
from diffkd.training.team import ALONE, Team, team_of
from diffkd.training.zero import Zero

HALF_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}
COMPILER = "inductor"
BLOCK_SHAPES = 64  # of one kind of block, in all networks together; after torch's own 8 it compiles no more
LEARNERS: dict[DistributedType, type[Learner]] = {
    DistributedType.FSDP: Shards, DistributedType.DEEPSPEED: Zero,
}  # fmt: skip


@dataclass(frozen=True)
class StageState:
    """Everything that changes during a stage, all of which a checkpoint holds.

    followers: networks that do not learn and are not the teacher, which a method may move. team: all
    processes of the run.
    """

    learners: dict[str, Learner]
    followers: dict[str, nn.Module]
    log: TrainingLog
    monitor: DivergenceMonitor
    team: Team


def prepare(
    accelerator: Accelerator, nets: Mapping[str, nn.Module], stage: Stage, training: Training
) -> StageState:
    """Prepares the networks in place; inside a Model only its network, so that its methods stay reachable."""
    trained = [name for name, net in nets.items() if _is_trained(net)]
    for name in stage.networks:
        if name not in trained:
            raise UserError(
                f"stage {stage.name} says how network {name!r} learns, which is not trained; trained are "
                f"{', '.join(trained)}"
            )
    for name, net in nets.items():
        half = HALF_PRECISION.get(training.precision) if name == "teacher" else None
        _place(accelerator, net, training, half)
        if isinstance(net, Denoiser) and net.worse is not None:
            _place(accelerator, net.worse, training, half)
    kind = LEARNERS.get(accelerator.distributed_type, Copies)
    learners = {}
    for name in trained:
        net = nets[name]
        network = net.network if isinstance(net, Model) else net
        optimization = _optimization(name, stage, training)
        learners[name] = kind(accelerator, network, training, optimization, alone=len(trained) == 1)
        if isinstance(net, Model):
            net.network = learners[name].network
    followers = {name: net for name, net in nets.items() if name not in (*trained, "teacher")}
    monitor = DivergenceMonitor(stage.name, training.max_skipped)
    log = TrainingLog(accelerator.device)
    return StageState(learners, followers, log, monitor, team_of(accelerator))


def _is_trained(net: nn.Module) -> bool:
    return any(p.requires_grad for p in net.parameters())


def _optimization(name: str, stage: Stage, training: Training) -> Optimization:
    """How a network learns: as its stage says, or else the config."""
    own = stage.optimization(name)
    ema = training.ema if own.ema is None and name == "student" else own.ema
    return replace(own, betas=own.betas or training.betas, ema=ema)


def _place(accelerator: Accelerator, net: nn.Module, training: Training, half: torch.dtype | None) -> None:
    """On the device, in the memory format that it runs in; compiled if the config says so.

    half: the dtype of a network that never changes. One that a method moves keeps float32: in half precision
    the small steps towards the student would be rounded away.
    """
    network: Any = net.network if isinstance(net, Model) else net
    if training.gradient_checkpointing and isinstance(net, Model):  # others are small
        if getattr(network, "_supports_gradient_checkpointing", False):
            interval.check_recomputed(network)
            network.enable_gradient_checkpointing()  # a frozen one's too: gradients may go through it
        elif _is_trained(net):
            raise UserError(
                f"training.gradient_checkpointing is not supported by {type(network).__name__}; leave it out"
            )
    if not _is_trained(net):
        network.to(accelerator.device, half)
    if accelerator.device.type == "cuda":
        network.to(memory_format=torch.channels_last)
    if training.compile:
        _compile(network)


def _compile(network: Any) -> None:
    """In place, so that its weights keep their names: the blocks that it says it repeats, each kind once for
    each shape, or else the whole network."""
    repeated = getattr(network, "_repeated_blocks", None) or ()
    if any(type(module).__name__ in repeated for module in network.modules()):
        torch._dynamo.config.cache_size_limit = BLOCK_SHAPES
        network.compile_repeated_blocks(backend=COMPILER, dynamic=False)
    else:
        network.compile(backend=COMPILER, dynamic=False)


# checkpoints: student, student-optimizer and ema; of another network NAME, NAME-optimizer and NAME-ema


def _files(name: str) -> dict[str, str]:
    """The files of what `Learner.tensors` gives."""
    ema = "ema" if name == "student" else f"{name}-ema"
    return {"network": name, "optimizer": f"{name}-optimizer", "ema": ema}


def save(accelerator: Accelerator, run: RunFolder, stage_index: int, done: int, state: StageState) -> None:
    """Copies the state to the host and writes it while training goes on. Every process must call it.

    A sharded network is written by all processes, each its part; what all hold whole by the main one.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, learner in state.learners.items():
        files = _files(name)
        tensors |= {files[kind]: values for kind, values in learner.tensors().items()}
    for name, net in state.followers.items():
        copies = {key: unsharded(value, accelerator) for key, value in adapters.state(net).items()}
        tensors[name] = {key: value for key, value in copies.items() if value is not None}
    averages = {name: one.average.optimization_step for name, one in state.learners.items() if one.average}
    content = {
        "ema_step": averages.pop("student"),
        "ema_steps": averages,
        "watch": state.monitor.state(),
        "meters": gather_object([state.log.state()]),
        "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
    }
    in_parts = any(learner.in_parts for learner in state.learners.values())
    if in_parts or accelerator.is_main_process:
        run.checkpoints.save(stage_index, done, tensors, content, state.team if in_parts else ALONE)


def restore(accelerator: Accelerator, run: RunFolder, stage_index: int, state: StageState) -> int:
    """Loads the stage's newest checkpoint; the number of updates done, 0 if there is none."""
    checkpoint = run.checkpoints.load(stage_index, state.team)
    if checkpoint is None:
        return 0
    content = checkpoint.state
    try:
        _fill(accelerator, state, checkpoint.tensors)
        steps = {"student": content["ema_step"], **content.get("ema_steps", {})}  # the others' came later
        for name, learner in state.learners.items():
            if learner.average is not None:
                learner.average.optimization_step = steps[name]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the checkpoint of stage {stage_index} does not fit the networks of this run ({error}); "
            "delete it, or use the diffkd that wrote it"
        ) from error
    state.monitor.load(content["watch"])
    state.log.load(content["meters"], accelerator.process_index, accelerator.num_processes)
    if accelerator.scaler is not None and content["scaler"] is not None:
        accelerator.scaler.load_state_dict(content["scaler"])
    return checkpoint.update


def _fill(accelerator: Accelerator, state: StageState, tensors: Mapping[str, Mapping[str, Stored]]) -> None:
    """tensors: those of the main process, {} on the others; or in parts, on each."""
    for name, learner in state.learners.items():
        learner.load({kind: tensors.get(file, {}) for kind, file in _files(name).items()})
    for name, net in state.followers.items():
        fill(adapters.state(net), tensors.get(name, {}), accelerator)
