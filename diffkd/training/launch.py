"""The processes of a run: what a launcher says of them, and that one of them was lost."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin

from diffkd.errors import UserError
from diffkd.training.config import Training


def make_accelerator(training: Training) -> Accelerator:
    """As a launcher configured it. Raises UserError for what is not installed, or not for this machine."""
    AcceleratorState._reset_state()  # a teacher's training before may have had another precision
    # Without the word, accelerate takes the processes of a launcher on a CPU for strangers.
    cpu = not torch.accelerator.is_available()
    if not cpu:
        torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions are already
    precision = training.precision.replace("float32", "no")
    try:
        accelerator = Accelerator(cpu=cpu, mixed_precision=precision)
    except (ImportError, ValueError) as error:  # what is not installed, or not for this machine
        raise UserError(f"accelerate cannot begin as it is configured: {error}") from error
    if accelerator.num_processes == 1:
        return accelerator
    if cpu:
        _as_configured(accelerator)
    if (
        accelerator.distributed_type == DistributedType.FSDP
        and accelerator.state.fsdp_plugin.fsdp_version != 2
    ):
        raise UserError("FSDP version 1 is not supported; set fsdp_version: 2 in accelerate's config")
    return accelerator


def _as_configured(accelerator: Accelerator) -> None:
    """On CPUs accelerate passes over what its config says of FSDP and DeepSpeed; both work there, so that
    what GPUs will do can be tried, and is tested."""
    state = accelerator.state
    if _asked("ACCELERATE_USE_FSDP"):
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        if accelerator.mixed_precision != "no":
            state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
        kind = DistributedType.FSDP
    elif _asked("ACCELERATE_USE_DEEPSPEED"):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        plugin = DeepSpeedPlugin()
        plugin.select(_from_accelerator_state=True)
        state.deepspeed_plugins = {"default": plugin}
        kind = DistributedType.DEEPSPEED
    else:
        return
    for shared in (AcceleratorState._shared_state, PartialState._shared_state):
        shared["distributed_type"] = kind


def _asked(name: str) -> bool:
    return os.environ.get(name, "").lower() == "true"


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process is gone, rather than what went wrong in this one."""
    named = type(error).__name__ in ("DistBackendError", "DistNetworkError")
    return named or (isinstance(error, RuntimeError) and "gloo" in str(error) and "onnection" in str(error))
