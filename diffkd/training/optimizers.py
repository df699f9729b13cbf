"""The optimizers that networks learn by, and their state as plain tensors by name, for checkpoints."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from diffkd.errors import UserError
from diffkd.training.config import Training

ENGINES = {DistributedType.FSDP: "FSDP2", DistributedType.DEEPSPEED: "DeepSpeed"}
CODES, SCALES = "codes", "scale"  # of a moment in 8 bits, as torchao names them
BLOCK = 256  # values that share a scale
SIGNED = "exp_avg"  # the one of the two moments that may be negative


def engine(accelerator: Accelerator) -> str | None:
    """What divides networks among processes; None where each has a copy."""
    return ENGINES.get(accelerator.distributed_type)


def check(training: Training, accelerator: Accelerator) -> None:
    """Raises UserError where training.optimizer or training.ema_device is not to be had."""
    divided = engine(accelerator)
    if training.optimizer == "adamw_8bit":
        if divided is not None:
            raise UserError(
                f"training.optimizer adamw_8bit does not work under {divided}, which divides the moments "
                "among processes; use adamw, or configs/accelerate/ddp.yaml"
            )
        if importlib.util.find_spec("torchao") is None:
            raise UserError(
                "training.optimizer adamw_8bit needs torchao; install it with pip install torchao, or use "
                "adamw"
            )
    if training.ema_device == "cpu" and divided == "FSDP2":
        raise UserError(
            "training.ema_device cpu does not work under FSDP2, which divides the average among processes; "
            "leave it out"
        )


def make(network: nn.Module, training: Training, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """The optimizer of the parameters that learn; `set_rate` comes before every update."""
    params = [p for p in network.parameters() if p.requires_grad]
    if training.optimizer == "adamw":
        fused = params[0].device.type in ("cuda", "cpu")
        return torch.optim.AdamW(params, betas=betas, weight_decay=training.weight_decay, fused=fused)
    from torchao.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(
        params, betas=betas, weight_decay=training.weight_decay, block_size=BLOCK
    )
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def stepping(training: Training) -> AbstractContextManager[Any]:
    """What a step is taken in. torchao would compile its arithmetic; the config says whether anything is."""
    if training.optimizer == "adamw" or training.compile:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """What is kept of a parameter, by name. A moment in 8 bits is two tensors: KEY.codes, uint8 and shaped
    like the parameter, and KEY.scale, float32, one of each block of values (Dettmers et al. 2022)."""
    for key, value in state.items():
        if hasattr(value, CODES):
            yield f"{key}.{CODES}", value.codes
            yield f"{key}.{SCALES}", value.scale
        else:
            yield key, value


def blank(param: Tensor, keys: Iterable[str], training: Training) -> dict[str, Any]:
    """A state of zeros that `tensors` names so, to be filled in place."""
    state: dict[str, Any] = {}
    for key in keys:
        name, _, part = key.partition(".")
        if name == "step":  # torchao's is on the host
            device = "cpu" if training.optimizer == "adamw_8bit" else param.device
            state[name] = torch.zeros((), device=device)
        elif not part:
            state[name] = torch.zeros_like(param).detach()
        elif name not in state:
            from torchao.optim.subclass_8bit import OptimState8bit

            state[name] = OptimState8bit.zeros(param.shape, name == SIGNED, BLOCK, param.device, param.dtype)
    return state
