"""The contract of a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffkd.core.denoiser import Denoiser
from diffkd.io.config import Strict
from diffkd.io.prefetch import to_device


@dataclass(frozen=True)
class Stage:
    """One stretch of training with its own step count, optimizer, EMA and learning-rate ramp.

    name: of the student that it ends with. steps: the student's sampling steps, None for a model that has
    none of its own. substeps, sampler: teacher steps that one student step replaces, and how they are taken.
    guidance: of the teacher's predictions. prediction: what the student outputs, None for what it already
    does.
    """

    name: str
    updates: int
    learning_rate: float
    warmup: int = 0
    steps: int | None = None
    substeps: int = 1
    sampler: str = "ddim"
    guidance: float = 1.0
    prediction: str | None = None

    def rate(self, update: int) -> float:
        """Learning rate of update 0, 1, ..., updates - 1: a linear warm-up, then a linear ramp to zero."""
        ramp = 1 - update / self.updates
        return self.learning_rate * min(1.0, (update + 1) / (self.warmup + 1)) * ramp


@dataclass(frozen=True)
class Batch:
    """x0: (B, C, H, W) float32 in [-1, 1]. cond: the conditioning, {} or {"class_labels": (B,)}."""

    x0: Tensor
    cond: Mapping[str, Tensor]

    def to(self, device: torch.device) -> Batch:
        return Batch(
            to_device(self.x0, device), {key: to_device(value, device) for key, value in self.cond.items()}
        )


@dataclass(frozen=True)
class Loss:
    """network: the name of the one that gets gradients. value: a scalar.

    metrics: detached values per example, each (B,); "t", the noise level of each example, sorts the others
    into bins.
    """

    network: str
    value: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Method(Strict, ABC):
    """One distillation algorithm. Subclasses are final; their fields are their config.

    `losses` is a generator: the engine updates the named network before it asks for the next loss, so that a
    method with several optimizers reads like its algorithm box. Only the named network gets gradients.
    """

    reference: ClassVar[str]
    kind: ClassVar[type[Any]] = Denoiser  # of its teacher and its student
    hooks: ClassVar[bool] = False  # whether it sets hooks in them, which torch.compile passes over

    @abstractmethod
    def stages(self, start: Any) -> list[Stage]:
        """What is trained, in order. start: the model that the first stage begins from (not changed), of the
        method's own kind.

        Raises UserError where the method does not fit it.
        """

    def networks(self, teacher: Any, student: Any) -> dict[str, torch.nn.Module]:
        """Networks needed beside these two, those that learn with parameters that require gradients."""
        return {}

    @abstractmethod
    def losses(
        self, nets: Mapping[str, Any], batch: Batch, stage: Stage, rng: torch.Generator
    ) -> Iterator[Loss]:
        """The losses of one update, each computed after the network of the one before was updated."""

    def after_update(self, nets: Mapping[str, Any], stage: Stage) -> None:
        """Called once per update: target networks."""
