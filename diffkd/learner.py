"""A network that learns, with its optimizer, over all processes: one device, DDP, FSDP2 or DeepSpeed.

What the processes have of it differs; what `tensors` gives and `load` takes does not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

Arguments = Mapping[str, Any]


class Learner:
    """One trained network, prepared by accelerate.

    network: what is called, sharded or wrapped where there are several processes. alone: whether no other
    network learns. DDP exchanges gradients while they are computed, but in every backward pass through the
    network, also those for others; so it is used for the only one, and the gradients of several are
    exchanged after each loss.
    """

    def __init__(
        self, accelerator: Accelerator, network: nn.Module, arguments: Arguments, *, alone: bool
    ) -> None:
        self.accelerator = accelerator
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        self._exchanges = not self.sharded and not alone and accelerator.num_processes > 1
        # FSDP2 turns the network itself into one that is sharded; this one is exported.
        keeps = self.sharded and accelerator.is_main_process
        self._whole = copy.deepcopy(network).cpu() if keeps else None
        optimizer: Any = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], **arguments)
        if self._exchanges:
            self.network = accelerator.prepare_model(network, evaluation_mode=True)
            self.optimizer = accelerator.prepare(optimizer)
        else:
            self.network, self.optimizer = accelerator.prepare(network, optimizer)
        self.params = [p for p in self.network.parameters() if p.requires_grad]

    @property
    def bare(self) -> nn.Module:
        """The network without what accelerate wrapped around it."""
        found: nn.Module = self.accelerator.unwrap_model(self.network)
        return found

    @property
    def names(self) -> list[str]:
        """Of all its parameters, in their order."""
        return [name for name, _ in self.bare.named_parameters()]

    def rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    @contextmanager
    def no_exchange(self) -> Iterator[None]:
        """Gradients stay with the process, to be added to."""
        if self._exchanges:
            yield
        else:
            with self.accelerator.no_sync(self.network):
                yield

    def backward(self, value: Tensor) -> None:
        """Adds to the gradients of this network alone. FSDP2 has the graph's leaves to itself; there the
        others get gradients too, which `Learner.forget` drops."""
        if self.sharded:
            self.accelerator.backward(value)
        else:
            self.accelerator.backward(value, inputs=self.params)

    def norm(self, most: float | None) -> Tensor:
        """The norm of the gradients of all processes, which are clipped to `most`; a scalar."""
        if self._exchanges:
            _mean([p.grad for p in self.params if p.grad is not None])
        self.accelerator.unscale_gradients(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.params, most or float("inf"))
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def step(self) -> None:
        self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Drops the gradients."""
        self.optimizer.zero_grad()

    # whole tensors, for checkpoints

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """{"network": by name, "optimizer": by "name/what"}: whole, on the host, nobody else's. Every process
        must call it; all but the main one get none."""
        found: dict[str, dict[str, Tensor]] = {"network": {}, "optimizer": {}}
        for name, value in self.bare.state_dict().items():
            found["network"] |= _named(name, whole(value, self.accelerator))
        for name, param in self.bare.named_parameters():
            for what, value in self.optimizer.state.get(param, {}).items():
                found["optimizer"] |= _named(f"{name}/{what}", whole(value, self.accelerator))
        return found

    def load(self, found: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes them back, on any number of processes. found: of the main process; {} in others."""
        state = self.bare.state_dict()
        fill(state, found.get("network", {}), self.accelerator)
        keys = [list(found.get("optimizer", {}))]
        broadcast_object_list(keys)
        moments: dict[str, Tensor] = {}
        params = dict(self.bare.named_parameters())
        for key in keys[0]:
            name, _, what = key.rpartition("/")
            param = params[name]
            empty = torch.zeros((), device=param.device) if what == "step" else torch.zeros_like(param)
            moments[key] = self.optimizer.state[param][what] = empty.detach()
        fill(moments, found.get("optimizer", {}), self.accelerator)

    def trained(self, averages: Iterable[Tensor]) -> nn.Module:
        """The network of these weights, as it was before accelerate had it. Every process must call it; under
        FSDP2 only the main one gets it whole."""
        bare = self.bare
        if self.sharded:
            found = [whole(value, self.accelerator) for value in averages]
            if self._whole is None:
                return bare
            bare, averages = self._whole, [value for value in found if value is not None]
        with torch.no_grad():
            for param, value in zip(bare.parameters(), averages, strict=True):
                param.copy_(value)
        return bare


def _named(name: str, value: Tensor | None) -> dict[str, Tensor]:
    return {} if value is None else {name: value}


@torch.no_grad()
def whole(value: Tensor, accelerator: Accelerator) -> Tensor | None:
    """A copy on the host, put together by the main process where the tensor is in shards; None in others."""
    if isinstance(value, DTensor):
        if value.device_mesh.ndim > 1 or value.placements not in ((Shard(0),), (Replicate(),)):
            value = value.full_tensor()
        else:
            return _gathered(value, accelerator)
    return value.detach().to("cpu", copy=True) if accelerator.is_main_process else None


def _gathered(value: DTensor, accelerator: Accelerator) -> Tensor | None:
    """Rows of equal shares from every process, of which the last ones may have fewer or none."""
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
def fill(targets: Mapping[str, Tensor], found: Mapping[str, Tensor], accelerator: Accelerator) -> None:
    """The main process's tensors into everybody's, shards or not, one at a time."""
    for name, target in targets.items():
        value = found[name] if accelerator.is_main_process else torch.empty(target.shape, dtype=target.dtype)
        if value.shape != target.shape or value.dtype != target.dtype:
            raise ValueError(
                f"{name} is {value.dtype} {tuple(value.shape)}, not {target.dtype} {tuple(target.shape)}"
            )
        value = value.to(target.device)
        if isinstance(target, DTensor):
            target.copy_(distribute_tensor(value, target.device_mesh, target.placements))
            continue
        if accelerator.num_processes > 1:
            dist.broadcast(value, 0)
        target.copy_(value)


def _mean(gradients: list[Tensor]) -> None:
    """Over processes, in place, in one exchange for each dtype."""
    for dtype in {gradient.dtype for gradient in gradients}:
        alike = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = torch.cat([gradient.flatten() for gradient in alike])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, part in zip(alike, flat.split([g.numel() for g in alike]), strict=True):
            gradient.copy_(part.view_as(gradient))
