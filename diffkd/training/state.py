"""What a stage changes, to a checkpoint and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from diffkd.errors import UserError
from diffkd.training.divergence import DivergenceMonitor
from diffkd.training.learner import Learner, fill, whole
from diffkd.training.log import TrainingLog
from diffkd.training.run_folder import RunFolder


@dataclass
class StageState:
    """What a stage changes, and a checkpoint keeps.

    followers: networks that do not learn and are not the teacher, which a method may move.
    """

    learners: dict[str, Learner]
    followers: dict[str, nn.Module]
    ema: EMAModel
    meter: TrainingLog
    watch: DivergenceMonitor


def save(accelerator: Accelerator, run: RunFolder, stage_index: int, done: int, state: StageState) -> None:
    """A copy on the host, which is written while training goes on. Every process must call it."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, learner in state.learners.items():
        found = learner.tensors()
        tensors[name], tensors[f"{name}-optimizer"] = found["network"], found["optimizer"]
    named = {name: dict(net.state_dict()) for name, net in state.followers.items()}
    named["ema"] = dict(zip(state.learners["student"].names, state.ema.shadow_params, strict=True))
    for name, values in named.items():
        copies = {key: whole(value, accelerator) for key, value in values.items()}
        tensors[name] = {key: value for key, value in copies.items() if value is not None}
    content = {
        "ema_step": state.ema.optimization_step,
        "watch": state.watch.state(),
        "meters": gather_object([state.meter.state()]),
        "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
    }
    if accelerator.is_main_process:
        run.checkpoints.save(stage_index, done, tensors, content)


def restore(accelerator: Accelerator, run: RunFolder, stage_index: int, state: StageState) -> int:
    """Loads the stage's newest checkpoint; the number of updates done, 0 where there is none."""
    found = run.checkpoints.load(stage_index) if accelerator.is_main_process else None
    known = [None if found is None else (found.update, found.state)]
    broadcast_object_list(known)
    if known[0] is None:
        return 0
    done, content = known[0]
    try:
        _fill(accelerator, state, {} if found is None else found.tensors)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the checkpoint of stage {stage_index} does not fit the networks of this run ({error}); "
            "delete it, or use the diffkd that wrote it"
        ) from error
    state.ema.optimization_step = content["ema_step"]
    state.watch.load(content["watch"])
    state.meter.load(content["meters"], accelerator.process_index, accelerator.num_processes)
    if accelerator.scaler is not None and content["scaler"] is not None:
        accelerator.scaler.load_state_dict(content["scaler"])
    return int(done)


def _fill(accelerator: Accelerator, state: StageState, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """tensors: of the main process."""
    for name, learner in state.learners.items():
        learner.load({"network": tensors.get(name, {}), "optimizer": tensors.get(f"{name}-optimizer", {})})
    for name, net in state.followers.items():
        fill(net.state_dict(), tensors.get(name, {}), accelerator)
    names = state.learners["student"].names
    fill(dict(zip(names, state.ema.shadow_params, strict=True)), tensors.get("ema", {}), accelerator)
