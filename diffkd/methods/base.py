"""The contract of a method: the stages it trains in, and the losses of one update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffkd.core.denoiser import Denoiser, StockSampler
from diffkd.io.config import Strict
from diffkd.io.prefetch import to_device


@dataclass(frozen=True)
class Optimization:
    """How one network learns; None is what the stage, or else the training config, says.

    ema: decay of the moving average of its weights, which it holds when the stage ends. Only the student has
    one by default.
    """

    learning_rate: float | None = None
    betas: tuple[float, float] | None = None
    ema: float | None = None


@dataclass(frozen=True)
class Pairs:
    """Noises and what the teacher makes of them, drawn once and kept: count of them, steps and sampler."""

    count: int
    steps: int
    sampler: str = "ddim"


@dataclass(frozen=True)
class Needs:
    """What a method takes beside a teacher and a student, for its users.

    data: whether it learns from images, and not from their labels alone. real: whether these must be the
    data's own, and not what the teacher draws, by default. pairs: whether it learns from noises and what the
    teacher makes of them. labels: whether it cannot do without labels (of denoisers, or prompts);
    unconditional: nor without the input that means none. after: which kind of student it starts from, where
    that is no teacher. networks: more that it trains or keeps, each with its condition, if any, by "with" or
    "where". memory: what these and their activations take, in words; "" for no more than teacher and student.
    in_short: the same in a word or two. calls: of networks in one update of a student of one step, without
    guidance, such as "1 student, 2 teacher". passes: the same by numbers, of a batch through each network, at
    the default settings.
    """

    data: bool = True
    real: bool = False
    pairs: bool = False
    labels: bool = False
    unconditional: bool = False
    after: str = ""
    networks: tuple[str, ...] = ()
    memory: str = ""
    in_short: str = ""
    calls: str = ""
    passes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """One stretch of training with its own step count, optimizers, EMA and learning-rate ramp.

    name: of the student that it ends with. steps: the student's sampling steps, None for a model that has
    none of its own. substeps, sampler: teacher steps that one student step replaces, and how they are taken,
    None where the teacher takes none.
    guidance: of the teacher's predictions. prediction: what the student outputs, None for what it already
    does. drawn: the sampler that the student is trained for, which decides the stock scheduler it is saved
    with. networks: by name, the trained networks that do not learn as the stage says. teacher: which it
    learns from: `original`, the run's own; `previous`, the last student before it; or the name of a student
    before it. every_time: whether it asks that one at every noise level. also: more step counts, for each of
    which the trained network is saved as a student of its own, before the one of `steps`. interval: whether
    the student takes the length of a step as a second number while it trains (`core.interval`), which is
    folded into what is saved. guidance_range: of weights that the student takes as an input, drawn evenly for
    each example, in place of `guidance`; None for a student that goes on as it began. pairs: what the batches
    are made of in place of the data.
    """

    name: str
    updates: int
    learning_rate: float
    warmup: int = 0
    steps: int | None = None
    substeps: int = 1
    sampler: str | None = None
    guidance: float = 1.0
    prediction: str | None = None
    drawn: StockSampler = "ddim"
    networks: Mapping[str, Optimization] = field(default_factory=dict)
    teacher: str = "previous"
    every_time: bool = False
    also: tuple[int, ...] = ()
    interval: bool = False
    guidance_range: tuple[float, float] | None = None
    pairs: Pairs | None = None

    @classmethod
    def for_steps(
        cls, steps: Sequence[int], updates: int, learning_rate: float, warmup: int, **more: Any
    ) -> Stage:
        """One whose network is saved for each of these step counts; what follows goes on from the last."""
        *also, last = steps
        return cls(f"{last}-steps", updates, learning_rate, warmup, last, also=tuple(also), **more)

    @property
    def students(self) -> list[Stage]:
        """The stage as each of its students has it: those of the step counts in `also`, then its own."""
        suffix = self.name.removeprefix(f"{self.steps}-steps")
        others = [replace(self, name=f"{n}-steps{suffix}", steps=n, also=()) for n in self.also]
        return [*others, replace(self, also=())]

    def optimization(self, network: str) -> Optimization:
        return self.networks.get(network, Optimization())

    def rate(self, update: int, network: str = "student") -> float:
        """A network's learning rate at update 0, 1, ..., updates - 1: a linear warm-up, then a linear ramp to
        zero."""
        own = self.optimization(network).learning_rate
        ramp = 1 - update / self.updates
        rate = self.learning_rate if own is None else own
        return rate * min(1.0, (update + 1) / (self.warmup + 1)) * ramp


@dataclass(frozen=True)
class Step:
    """One update of a stage. update: its number, from 0."""

    stage: Stage
    update: int

    @property
    def progress(self) -> float:
        """The share of the stage that is done, in [0, 1)."""
        return self.update / self.stage.updates


@dataclass(frozen=True)
class Batch:
    """x0: (B, C, H, W) float32 in [-1, 1]. cond: the conditioning, {} or {"class_labels": (B,)}.

    noise: (B, C, H, W), of a stage of pairs: what its teacher made x0 of.
    """

    x0: Tensor
    cond: Mapping[str, Tensor]
    noise: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        cond = {key: to_device(value, device) for key, value in self.cond.items()}
        return Batch(
            to_device(self.x0, device), cond, None if self.noise is None else to_device(self.noise, device)
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

    `losses` is a generator: the trainer updates the named network before it asks for the next loss, so a
    method with several optimizers reads like its algorithm box. Only the named network gets gradients. Every
    random number comes from `rng`, and everything that changes over a stage from `step`, so that a resumed
    run repeats what an unbroken one does.
    """

    reference: ClassVar[str]
    kind: ClassVar[type[Any]] = Denoiser  # of its teacher and its student
    hooks: ClassVar[bool] = False  # whether it sets hooks on them, which torch.compile ignores
    needs: ClassVar[Needs] = Needs()

    def learns_from_data(self) -> bool:
        """Whether it does so with these settings; else it takes the size and the labels of images alone."""
        return self.needs.data

    def learns_what_data_is(self) -> bool:
        """Whether the data's images teach it with these settings; else they only say where to ask the
        teacher, and images that it drew itself do as well."""
        return self.needs.real

    @abstractmethod
    def stages(self, start: Any) -> list[Stage]:
        """What is trained, in order. start: the model that the first stage begins from (not changed), of the
        method's own kind.

        Raises UserError if the method does not fit it.
        """

    def networks(self, teacher: Any, student: Any) -> dict[str, torch.nn.Module]:
        """The networks of a stage beside these two; those with parameters that require gradients learn."""
        return {}

    @abstractmethod
    def losses(
        self, nets: Mapping[str, Any], batch: Batch, step: Step, rng: torch.Generator
    ) -> Iterator[Loss]:
        """The losses of one update, each computed after the network of the previous one was updated."""

    def after_update(self, nets: Mapping[str, Any], step: Step) -> None:
        """Called once per update: moves target networks."""
