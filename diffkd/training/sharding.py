"""Tensors that processes hold as copies or as shards: kept, gathered, filled, averaged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from diffkd.training.parts import Divided


@torch.no_grad()
def own_rows(value: Tensor, accelerator: Accelerator) -> Tensor | None:
    """A CPU copy of what this process holds of a sharded tensor; of one that all hold whole, `unsharded`."""
    if isinstance(value, DTensor) and _is_in_rows(value):
        return value.to_local().to("cpu", copy=True)
    return unsharded(value, accelerator)


def _is_in_rows(value: DTensor) -> bool:
    return value.device_mesh.ndim == 1 and value.placements == (Shard(0),)


@torch.no_grad()
def unsharded(value: Tensor, accelerator: Accelerator) -> Tensor | None:
    """An unsharded CPU copy on the main process; None on the others."""
    if isinstance(value, DTensor):
        if _is_in_rows(value) or (value.device_mesh.ndim == 1 and value.placements == (Replicate(),)):
            return _gathered(value, accelerator)
        value = value.full_tensor()
    return value.detach().to("cpu", copy=True) if accelerator.is_main_process else None


def _gathered(value: DTensor, accelerator: Accelerator) -> Tensor | None:
    """Gathers shards of equally many rows; the last ranks may hold fewer, or none."""
    main, local = accelerator.is_main_process, value.to_local()
    if value.placements == (Replicate(),):
        return local.to("cpu", copy=True) if main else None
    share = -(-value.shape[0] // accelerator.num_processes)
    padded = local.new_zeros(share, *value.shape[1:])
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in range(accelerator.num_processes)] if main else None
    dist.gather(padded, parts)
    return torch.cat(parts)[: value.shape[0]].to("cpu", copy=True) if parts else None


Stored = Tensor | Divided


@torch.no_grad()
def fill(targets: Mapping[str, Tensor], values: Mapping[str, Stored], accelerator: Accelerator) -> None:
    """Copies values into the targets of all processes, sharded or not, one at a time.

    values: of the main process, {} on the others; or in parts, of which each process reads what it holds.
    """
    for name, target in targets.items():
        value = values[name] if values or accelerator.is_main_process else None
        if isinstance(value, Divided):
            _read(name, target, value, accelerator)
            continue
        if value is None:
            value = torch.empty(target.shape, dtype=target.dtype)
        _check(name, value, value.dtype, target)
        value = value.to(accelerator.device)  # which is where it is exchanged; an average may lie on the host
        if isinstance(target, DTensor):
            target.copy_(distribute_tensor(value, target.device_mesh, target.placements))
            continue
        if accelerator.num_processes > 1:
            dist.broadcast(value, 0)
        target.copy_(value)


def _read(name: str, target: Tensor, value: Divided, accelerator: Accelerator) -> None:
    """This process's rows of a tensor in parts."""
    count = value.shape[0] if value.shape else 1
    _check(name, value, target.dtype, target)
    if isinstance(target, DTensor) and not _is_in_rows(target):
        whole = value.whole().to(accelerator.device)
        target.copy_(distribute_tensor(whole, target.device_mesh, target.placements))
        return
    own, start = target, 0
    if isinstance(target, DTensor):
        own = target.to_local()
        start = accelerator.process_index * -(-count // accelerator.num_processes)
    if own.numel():
        rows = value.rows(start, start + (len(own) if own.ndim else 1))
        _check(name, value, rows.dtype, target)
        own.copy_(rows)


def _check(name: str, value: Stored, dtype: torch.dtype, target: Tensor) -> None:
    if value.shape != target.shape or dtype != target.dtype:
        raise ValueError(f"{name} is {dtype} {tuple(value.shape)}, not {target.dtype} {tuple(target.shape)}")


def average_gradients(gradients: list[Tensor]) -> None:
    """Averages over processes, in place, with one exchange for each dtype."""
    for dtype in {gradient.dtype for gradient in gradients}:
        group = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = torch.cat([gradient.flatten() for gradient in group])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, part in zip(group, flat.split([g.numel() for g in group]), strict=True):
            gradient.copy_(part.view_as(gradient))
