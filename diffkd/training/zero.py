"""A network that learns under DeepSpeed's ZeRO 2: gradients and moments in shards, weights in copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.errors import UserError
from diffkd.training.learner import Learner, adamw

MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero(Learner):
    """DeepSpeed's engine is the network, and steps by itself; it trains one network alone."""

    def _prepared(self, network: nn.Module, rate: float) -> tuple[Any, Any]:
        training, processes = self.training, self.accelerator.num_processes
        if not self.alone or training.precision != "float32":
            raise UserError(
                "DeepSpeed trains one network in float32 here, and this method trains several or "
                f"training.precision is {training.precision}; use configs/accelerate/ddp.yaml or fsdp2.yaml"
            )
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        stage = config.get("zero_optimization", {}).get("stage")
        if stage not in (1, 2):
            raise UserError(f"DeepSpeed's zero_stage {stage} is not supported; use 2, or fsdp2.yaml")
        config["train_micro_batch_size_per_gpu"] = training.batch_size // training.parts(processes)
        config["gradient_accumulation_steps"] = 1  # it is told when to exchange
        config["gradient_clipping"] = training.max_grad_norm or 0.0
        prepared = self.accelerator.prepare(network, adamw(network, training, rate))
        return prepared[0], prepared[1]

    @property
    def _zero(self) -> Any:
        return self.network.optimizer

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        self.network.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.network.set_gradient_accumulation_boundary(True)

    def backward(self, value: Tensor) -> None:
        self.network.backward(value)

    def norm(self) -> Tensor:
        norm = torch.as_tensor(self._zero.scaled_global_norm())
        return torch.where(norm < 0, torch.inf, norm)  # its word for NaN

    def step(self) -> None:
        self.network.step()

    def forget(self) -> None:
        """By its own way of skipping a step whose gradients are no numbers."""
        for group in self._zero.averaged_gradients.values():
            for gradient in group or ():
                gradient.fill_(torch.nan)
        self.network.step()

    def load(self, found: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The moments come into being with a first step, which is made of nothing."""
        if not self._zero.optimizer.state:
            self.rate(0.0)
            for part in self._zero.single_partition_of_fp32_groups:
                part.grad = torch.zeros_like(part)
            self._zero.optimizer.step()
            for part in self._zero.single_partition_of_fp32_groups:
                part.grad = None
            self._zero._lazy_init_hp_params_optimizer_state()
        super().load(found)

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        for name, param in self.bare.named_parameters():
            for what in MOMENTS if self._zero.optimizer.state else ():  # none before the first step
                yield f"{name}/{what}", safe_get_full_optimizer_state(param, what)
            for state in list(self._zero.optimizer.state.values())[:1]:
                yield f"{name}/step", state["step"]

    def _empty(self, name: str, what: str) -> Tensor:
        param = self.bare.get_parameter(name)
        return torch.zeros(() if what == "step" else param.shape, device=param.device)

    def _set(self, name: str, what: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        param = self.bare.get_parameter(name)
        if what == "step":
            for state in self._zero.optimizer.state.values():
                state["step"].copy_(value)
            safe_set_full_fp32_param(param, param.detach())  # which it has a copy of
        else:
            safe_set_full_optimizer_state(param, value, what)
