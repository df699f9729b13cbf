"""Tensors that processes hold as copies or as shards: gathered, filled, averaged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


@torch.no_grad()
def unsharded(value: Tensor, accelerator: Accelerator) -> Tensor | None:
    """An unsharded CPU copy on the main process; None on the others."""
    if isinstance(value, DTensor):
        if value.device_mesh.ndim > 1 or value.placements not in ((Shard(0),), (Replicate(),)):
            value = value.full_tensor()
        else:
            return _gathered(value, accelerator)
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


@torch.no_grad()
def fill(targets: Mapping[str, Tensor], values: Mapping[str, Tensor], accelerator: Accelerator) -> None:
    """Copies the main process's values into the targets of all processes, sharded or not, one at a time."""
    for name, target in targets.items():
        value = values[name] if accelerator.is_main_process else torch.empty(target.shape, dtype=target.dtype)
        if value.shape != target.shape or value.dtype != target.dtype:
            raise ValueError(
                f"{name} is {value.dtype} {tuple(value.shape)}, not {target.dtype} {tuple(target.shape)}"
            )
        value = value.to(accelerator.device)  # which is where it is exchanged; an average may lie on the host
        if isinstance(target, DTensor):
            target.copy_(distribute_tensor(value, target.device_mesh, target.placements))
            continue
        if accelerator.num_processes > 1:
            dist.broadcast(value, 0)
        target.copy_(value)


def average_gradients(gradients: list[Tensor]) -> None:
    """Averages over processes, in place, with one exchange for each dtype."""
    for dtype in {gradient.dtype for gradient in gradients}:
        group = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = torch.cat([gradient.flatten() for gradient in group])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, part in zip(group, flat.split([g.numel() for g in group]), strict=True):
            gradient.copy_(part.view_as(gradient))
