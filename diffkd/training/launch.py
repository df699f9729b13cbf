"""The processes of a run: the Accelerator that a launcher configured, and errors that mean one was lost."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    is_torch_version,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from diffkd.errors import UserError
from diffkd.io.processes import launched
from diffkd.io.text import log
from diffkd.training import surroundings
from diffkd.training.config import Training

FSDP_ON_CPU = "2.9"


def make_accelerator(training: Training) -> Accelerator:
    """The Accelerator of a launcher's processes and devices, and of nothing else that it may be told to do.

    Raises UserError if this machine cannot run that, or the environment would change the training.
    """
    surroundings.check()
    AcceleratorState._reset_state()  # the teacher may just have been trained in another precision
    # Without `cpu=True`, accelerate ignores the launcher on CPU and each process runs alone.
    cpu = not torch.accelerator.is_available() or _is_set("ACCELERATE_USE_CPU")
    launched(cpu)
    if not cpu:
        torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions are already
    precision = training.precision.replace("float32", "no")
    try:
        accelerator = Accelerator(
            cpu=cpu, mixed_precision=precision, dynamo_backend="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )  # fmt: skip
    except (ImportError, ValueError) as error:  # not installed, or not supported by this machine
        raise UserError(f"accelerate cannot start as it is configured: {error}") from error
    if accelerator.is_main_process:
        for line in surroundings.overruled(precision):
            log.warning("%s", line)
    if accelerator.num_processes == 1:
        return accelerator
    if cpu:
        _apply_on_cpu(accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise UserError("FSDP version 1 is not supported; set fsdp_version: 2 in accelerate's config")
        # Autocast alone, as without shards. FSDP2's own policy rounds what a network is called with too: in
        # bfloat16 its times are off by up to two entries of the table.
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
    return accelerator


def _apply_on_cpu(accelerator: Accelerator) -> None:
    """Switches FSDP or DeepSpeed on, as configured: accelerate ignores both on CPUs. They work there, so what
    runs on GPUs can be tried, and is tested, without any."""
    state = accelerator.state
    if _is_set("ACCELERATE_USE_FSDP"):
        if is_torch_version("<", FSDP_ON_CPU):
            raise UserError(
                f"FSDP2 is wrong on CPUs before torch {FSDP_ON_CPU} (gradients are added up, not averaged), "
                f"and this is torch {torch.__version__}; use a newer one, GPUs, or no FSDP"
            )
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        kind = DistributedType.FSDP
    elif _is_set("ACCELERATE_USE_DEEPSPEED"):
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


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() == "true"


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error means that another process is gone, rather than that something failed in this one."""
    named = type(error).__name__ in ("DistBackendError", "DistNetworkError")
    return named or (isinstance(error, RuntimeError) and "gloo" in str(error) and "onnection" in str(error))
