"""A network that learns, with its optimizer and moving average, over all processes: as copies, or as shards.

What each process holds of it differs, and so does what it keeps of it; `load` takes what any of them kept.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from diffkd.core import adapters
from diffkd.methods.base import Optimization
from diffkd.training import optimizers
from diffkd.training.config import Training
from diffkd.training.sharding import Stored, average_gradients, fill, own_rows, unsharded


class Learner(ABC):
    """One trained network with its optimizer, prepared by accelerate.

    network: what is called, sharded or wrapped if there are several processes. params: its parameters that
    learn. average: the moving average of its weights, in float32, or None. Of a network with an adapter,
    average and checkpoints hold that alone. All processes call every method but `set_rate` together.
    """

    network: Any
    optimizer: Any
    params: list[nn.Parameter]
    average: EMAModel | None = None
    in_parts = False  # whether each process keeps its own part of it, rather than the main one all

    def __init__(
        self,
        accelerator: Accelerator,
        network: nn.Module,
        training: Training,
        optimization: Optimization,
        *,
        alone: bool,
    ) -> None:
        """optimization: with betas. alone: whether no other network learns."""
        self.accelerator, self.training, self.alone = accelerator, training, alone
        assert optimization.betas is not None
        self.betas = optimization.betas
        self.network, self.optimizer = self._prepared(network)
        self._kept = [*self._kept_of(self.network).values()]
        self.params = [p for p in self._kept if p.requires_grad]
        if optimization.ema is not None:
            self.average = EMAModel(self._averaged(), decay=optimization.ema, foreach=True)
            self.average.to(dtype=torch.float32)

    @abstractmethod
    def _prepared(self, network: nn.Module) -> tuple[Any, Any]:
        """The network and its optimizer."""

    def _optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        return optimizers.make(network, self.training, self.betas)

    @property
    def bare(self) -> nn.Module:
        """The network without what accelerate wrapped around it."""
        network: nn.Module = self.accelerator.unwrap_model(self.network)
        return network

    def set_rate(self, learning_rate: float) -> None:
        optimizers.set_rate(self.optimizer, learning_rate)

    @abstractmethod
    def accumulating(self) -> AbstractContextManager[None]:
        """In it gradients are added up without being exchanged between processes."""

    @abstractmethod
    def backward(self, value: Tensor) -> None:
        """Adds to the gradients of this network; any that reach other networks are to be cleared."""

    @abstractmethod
    def norm(self) -> Tensor:
        """The norm of the gradients over all processes, a scalar. Clips them."""

    def step(self) -> None:
        with optimizers.stepping(self.training):
            self.optimizer.step()
        self.clear_gradients()

    def clear_gradients(self) -> None:
        self.optimizer.zero_grad()

    def update_average(self) -> None:
        if self.average is not None:
            self.average.step(self._averaged())

    def _averaged(self) -> list[nn.Parameter]:
        """The parameters where their average lies."""
        if self.training.ema_device is None:
            return self._kept
        place = torch.device(self.training.ema_device)
        return [nn.Parameter(p.detach().to(place), p.requires_grad) for p in self._kept]

    @torch.no_grad()
    def finish(self) -> nn.Module:
        """The network as it was before accelerate prepared it, with the averaged weights if there are any; if
        it was sharded, whole in the main process only."""
        bare = self.bare
        if self.average is not None:
            for param, value in zip(self._kept_of(bare).values(), self.average.shadow_params, strict=True):
                param.copy_(value)
        return bare

    # for checkpoints

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """CPU copies of what this process keeps, {"network": by name, "optimizer": by "name/key", "ema": by
        name}: its own rows if `in_parts`, or else whole tensors on rank 0 and none on the others. "ema" only
        if there is an average."""
        named: dict[str, Iterator[tuple[str, Tensor]]] = {
            "network": iter(adapters.state(self.bare).items()), "optimizer": self._moments(),
        }  # fmt: skip
        if self.average is not None:
            named["ema"] = iter(self._averages().items())
        copies: dict[str, dict[str, Tensor]] = {}
        for kind, values in named.items():
            copies[kind] = {}
            for name, value in values:
                copied = self._copied(value)
                if copied is not None:
                    copies[kind][name] = copied
        return copies

    def _copied(self, value: Tensor) -> Tensor | None:
        return unsharded(value, self.accelerator)

    def load(self, tensors: Mapping[str, Mapping[str, Stored]]) -> None:
        """Loads what `tensors` returned, on any number of processes: whole tensors on rank 0, the others pass
        {}; or on each of them tensors in parts."""
        fill(adapters.state(self.bare), tensors.get("network", {}), self.accelerator)
        moments = tensors.get("optimizer", {})
        keys = [list(moments)]
        broadcast_object_list(keys)
        self._load_moments(keys[0], moments)
        if self.average is not None:
            fill(self._averages(), tensors.get("ema", {}), self.accelerator)

    def _averages(self) -> dict[str, Tensor]:
        assert self.average is not None
        return dict(zip(self._kept_of(self.bare), self.average.shadow_params, strict=True))

    @staticmethod
    def _kept_of(bare: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that are kept, by name."""
        return adapters.own(bare) or dict(bare.named_parameters())

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        for name, param in self._kept_of(self.bare).items():
            for key, value in optimizers.tensors(self.optimizer.state.get(param, {})):
                yield f"{name}/{key}", value

    def _load_moments(self, keys: Sequence[str], moments: Mapping[str, Stored]) -> None:
        """keys: those of the main process's moments."""
        of: dict[str, list[str]] = {}
        for key in keys:
            name, moment = split(key)
            of.setdefault(name, []).append(moment)
        targets: dict[str, Tensor] = {}
        for name, held in of.items():
            param = self.bare.get_parameter(name)
            state = optimizers.blank(param, held, self.training)
            targets |= {f"{name}/{key}": value for key, value in optimizers.tensors(state)}
            self.optimizer.state[param] = state
        fill(targets, moments, self.accelerator)


class Copies(Learner):
    """One process, or several with a copy each.

    DDP exchanges gradients while they are computed, but in every backward pass through the network, those for
    other networks' losses included. So it is used only if a single network learns; the gradients of several
    are exchanged after each loss.
    """

    def _prepared(self, network: nn.Module) -> tuple[Any, Any]:
        self._exchanges = not self.alone and self.accelerator.num_processes > 1
        wrapped = self.accelerator.prepare_model(network, evaluation_mode=self._exchanges)
        return wrapped, self.accelerator.prepare(self._optimizer(wrapped))

    def accumulating(self) -> AbstractContextManager[None]:
        if self._exchanges:
            return nullcontext()
        context: AbstractContextManager[None] = self.accelerator.no_sync(self.network)
        return context

    def backward(self, value: Tensor) -> None:
        self.accelerator.backward(value, inputs=self.params)

    def norm(self) -> Tensor:
        if self._exchanges:
            average_gradients([p.grad for p in self.params if p.grad is not None])
        self.accelerator.unscale_gradients(self.optimizer)
        return torch.nn.utils.clip_grad_norm_(self.params, self.training.max_grad_norm or float("inf"))


class Shards(Learner):
    """FSDP2: every process holds a part of each weight, gradient and moment."""

    in_parts = True

    def _prepared(self, network: nn.Module) -> tuple[Any, Any]:
        # FSDP2 shards the network in place; this copy is what `finish` returns.
        self._whole = copy.deepcopy(network).cpu() if self.accelerator.is_main_process else None
        plugin = self.accelerator.state.fsdp_plugin
        configured = plugin.transformer_cls_names_to_wrap
        present = {type(module).__name__ for module in network.modules()}
        # accelerate insists that each class occur in every network
        plugin.transformer_cls_names_to_wrap = [name for name in configured or () if name in present]
        try:
            prepared = self.accelerator.prepare(network, self._optimizer(network))
        finally:
            plugin.transformer_cls_names_to_wrap = configured
        return prepared[0], prepared[1]

    def _reshard(self) -> None:
        """A call without a backward pass leaves weights gathered, in tensors that the optimizer does not
        know."""
        for module in self.network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        self._reshard()
        return super().tensors()

    def _copied(self, value: Tensor) -> Tensor | None:
        return own_rows(value, self.accelerator)

    def load(self, tensors: Mapping[str, Mapping[str, Stored]]) -> None:
        self._reshard()
        super().load(tensors)

    def accumulating(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = self.accelerator.no_sync(self.network)
        return context

    def backward(self, value: Tensor) -> None:
        self.accelerator.backward(value)  # FSDP's graph has leaves of its own, which `inputs` cannot name

    def norm(self) -> Tensor:
        self.accelerator.unscale_gradients(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.training.max_grad_norm or float("inf"))
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @torch.no_grad()
    def finish(self) -> nn.Module:
        self._reshard()
        bare = super().finish()
        gathered = [unsharded(param, self.accelerator) for param in bare.parameters()]
        if self._whole is None:
            return bare
        for param, value in zip(self._whole.parameters(), gathered, strict=True):
            assert value is not None
            param.copy_(value)
        return self._whole


def split(key: str) -> tuple[str, str]:
    """A parameter's name, and which of its moments."""
    name, _, moment = key.rpartition("/")
    return name, moment
