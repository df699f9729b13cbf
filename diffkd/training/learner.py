"""A network that learns, with its optimizer, over all processes: each with a copy, or with its shards.

What the processes have of it differs; what `tensors` gives and `load` takes does not.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from diffkd.training.config import Training


class Learner(ABC):
    """One trained network with its optimizer, prepared by accelerate.

    network: what is called, sharded or wrapped where there are several processes. params: its parameters
    that learn. Every method but `rate` and `bare` is called by all processes together.
    """

    network: Any
    optimizer: Any
    params: list[nn.Parameter]

    def __init__(
        self, accelerator: Accelerator, network: nn.Module, training: Training, rate: float, *, alone: bool
    ) -> None:
        """alone: whether no other network learns."""
        self.accelerator, self.training, self.alone = accelerator, training, alone
        self.network, self.optimizer = self._prepared(network, rate)
        self.params = [p for p in self.network.parameters() if p.requires_grad]

    @abstractmethod
    def _prepared(self, network: nn.Module, rate: float) -> tuple[Any, Any]:
        """The network and its optimizer. rate: of learning, to begin with."""

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

    @abstractmethod
    def accumulating(self) -> AbstractContextManager[None]:
        """Gradients stay with the process, to be added to."""

    @abstractmethod
    def backward(self, value: Tensor) -> None:
        """Adds to the gradients of this network; what others get of it is to be forgotten."""

    @abstractmethod
    def norm(self) -> Tensor:
        """The norm of the gradients of all processes, a scalar; they are clipped from then on."""

    def step(self) -> None:
        self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Drops the gradients."""
        self.optimizer.zero_grad()

    # whole tensors, for checkpoints

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """{"network": by name, "optimizer": by "name/what"}: whole, on the host, nobody else's. All but the
        main process get none."""
        found: dict[str, dict[str, Tensor]] = {"network": {}, "optimizer": {}}
        for kind, named in (("network", self.bare.state_dict().items()), ("optimizer", self._moments())):
            for name, value in named:
                copied = whole(value, self.accelerator)
                if copied is not None:
                    found[kind][name] = copied
        return found

    def load(self, found: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes them back, on any number of processes. found: of the main process; {} in others."""
        fill(self.bare.state_dict(), found.get("network", {}), self.accelerator)
        keys = [list(found.get("optimizer", {}))]
        broadcast_object_list(keys)
        moments = {key: self._empty(*_split(key)) for key in keys[0]}
        fill(moments, found.get("optimizer", {}), self.accelerator)
        for key, value in moments.items():
            self._set(*_split(key), value)

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        for name, param in self.bare.named_parameters():
            for what, value in self.optimizer.state.get(param, {}).items():
                yield f"{name}/{what}", value

    def _empty(self, name: str, what: str) -> Tensor:
        """Of the shape and place of what the optimizer keeps of a parameter."""
        param = self.bare.get_parameter(name)
        return torch.zeros((), device=param.device) if what == "step" else torch.zeros_like(param).detach()

    def _set(self, name: str, what: str, value: Tensor) -> None:
        self.optimizer.state[self.bare.get_parameter(name)][what] = value

    @torch.no_grad()
    def trained(self, averages: Iterable[Tensor]) -> nn.Module:
        """The network of these weights, as it was before accelerate had it; where it is in shards, whole in
        the main process only."""
        bare = self.bare
        for param, value in zip(bare.parameters(), averages, strict=True):
            param.copy_(value)
        return bare


class Copies(Learner):
    """One process, or several that have a copy each.

    DDP exchanges gradients while they are computed, but in every backward pass through the network, also
    those for others; so it is used for the only one that learns, and the gradients of several are exchanged
    after each loss.
    """

    def _prepared(self, network: nn.Module, rate: float) -> tuple[Any, Any]:
        self._exchanges = not self.alone and self.accelerator.num_processes > 1
        wrapped = self.accelerator.prepare_model(network, evaluation_mode=self._exchanges)
        return wrapped, self.accelerator.prepare(adamw(wrapped, self.training, rate))

    def accumulating(self) -> AbstractContextManager[None]:
        if self._exchanges:
            return nullcontext()
        found: AbstractContextManager[None] = self.accelerator.no_sync(self.network)
        return found

    def backward(self, value: Tensor) -> None:
        self.accelerator.backward(value, inputs=self.params)

    def norm(self) -> Tensor:
        if self._exchanges:
            _mean([p.grad for p in self.params if p.grad is not None])
        self.accelerator.unscale_gradients(self.optimizer)
        return torch.nn.utils.clip_grad_norm_(self.params, self.training.max_grad_norm or float("inf"))


class Shards(Learner):
    """FSDP2: every process has a part of each weight, gradient and moment."""

    def _prepared(self, network: nn.Module, rate: float) -> tuple[Any, Any]:
        # It turns the network itself into one that is sharded; this one is exported.
        self._whole = copy.deepcopy(network).cpu() if self.accelerator.is_main_process else None
        plugin = self.accelerator.state.fsdp_plugin
        asked, there = plugin.transformer_cls_names_to_wrap, {type(m).__name__ for m in network.modules()}
        # accelerate wants each class in every network
        plugin.transformer_cls_names_to_wrap = [name for name in asked or () if name in there]
        try:
            prepared = self.accelerator.prepare(network, adamw(network, self.training, rate))
        finally:
            plugin.transformer_cls_names_to_wrap = asked
        return prepared[0], prepared[1]

    def accumulating(self) -> AbstractContextManager[None]:
        found: AbstractContextManager[None] = self.accelerator.no_sync(self.network)
        return found

    def backward(self, value: Tensor) -> None:
        self.accelerator.backward(value)  # the graph's leaves are its own, and cannot be named

    def norm(self) -> Tensor:
        self.accelerator.unscale_gradients(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.training.max_grad_norm or float("inf"))
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @torch.no_grad()
    def trained(self, averages: Iterable[Tensor]) -> nn.Module:
        found = [whole(value, self.accelerator) for value in averages]
        if self._whole is None:
            return self.bare
        for param, value in zip(self._whole.parameters(), found, strict=True):
            assert value is not None
            param.copy_(value)
        return self._whole


def adamw(network: nn.Module, training: Training, rate: float) -> torch.optim.Optimizer:
    params = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        params, lr=rate, betas=training.betas, weight_decay=training.weight_decay,
        fused=params[0].device.type in ("cuda", "cpu"),
    )  # fmt: skip


def _split(key: str) -> tuple[str, str]:
    name, _, what = key.rpartition("/")
    return name, what


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
