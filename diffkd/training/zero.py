"""A network that learns under DeepSpeed's ZeRO 2: gradients and moments are sharded, weights are copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.errors import UserError
from diffkd.training.learner import Learner, split
from diffkd.training.sharding import Stored, fill

MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero(Learner):
    """The network is DeepSpeed's engine, which steps itself. It trains one network alone."""

    def _prepared(self, network: nn.Module) -> tuple[Any, Any]:
        training, processes = self.training, self.accelerator.num_processes
        if not self.alone or training.precision != "float32":
            raise UserError(
                "DeepSpeed trains a single network in float32 here, and this method trains several or "
                f"training.precision is {training.precision}; use configs/accelerate/ddp.yaml or fsdp2.yaml"
            )
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        stage = config.get("zero_optimization", {}).get("stage")
        if stage not in (1, 2):
            raise UserError(f"DeepSpeed's zero_stage {stage} is not supported; use 2, or fsdp2.yaml")
        config["train_micro_batch_size_per_gpu"] = training.batch_size // training.parts(processes)
        config["gradient_accumulation_steps"] = 1  # `accumulating` says when gradients are exchanged
        config["gradient_clipping"] = training.max_grad_norm or 0.0
        prepared = self.accelerator.prepare(network, self._optimizer(network))
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
        return torch.where(norm < 0, torch.inf, norm)  # -1 is how it reports NaN

    def step(self) -> None:
        self.network.step()

    def clear_gradients(self) -> None:
        """Through DeepSpeed's own way of skipping a step: gradients that are NaN."""
        for group in self._zero.averaged_gradients.values():
            for gradient in group or ():
                gradient.fill_(torch.nan)
        self.network.step()

    def load(self, tensors: Mapping[str, Mapping[str, Stored]]) -> None:
        """DeepSpeed creates the moments in the first step, so one of zero gradients is made before."""
        if not self._zero.optimizer.state:
            self.set_rate(0.0)
            for part in self._zero.single_partition_of_fp32_groups:
                part.grad = torch.zeros_like(part)
            self._zero.optimizer.step()
            for part in self._zero.single_partition_of_fp32_groups:
                part.grad = None
            self._zero._lazy_init_hp_params_optimizer_state()
        super().load(tensors)

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        for name, param in self.bare.named_parameters():
            for key in MOMENTS if self._zero.optimizer.state else ():  # none before the first step
                yield f"{name}/{key}", safe_get_full_optimizer_state(param, key)
            for state in list(self._zero.optimizer.state.values())[:1]:
                yield f"{name}/step", state["step"]

    def _load_moments(self, keys: Sequence[str], moments: Mapping[str, Stored]) -> None:
        targets = {key: self._empty(*split(key)) for key in keys}
        fill(targets, moments, self.accelerator)
        for key, value in targets.items():
            self._set(*split(key), value)

    def _empty(self, name: str, key: str) -> Tensor:
        param = self.bare.get_parameter(name)
        return torch.zeros(() if key == "step" else param.shape, device=param.device)

    def _set(self, name: str, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        param = self.bare.get_parameter(name)
        if key == "step":
            for state in self._zero.optimizer.state.values():
                state["step"].copy_(value)
            safe_set_full_fp32_param(param, param.detach())  # the engine's own float32 copy of the weights
        else:
            safe_set_full_optimizer_state(param, value, key)
