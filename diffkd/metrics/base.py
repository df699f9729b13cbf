"""The contract of a metric."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from diffkd.io.config import Strict
from diffkd.metrics.frechet import Gaussian
from diffkd.metrics.statistics import Statistics

MAIN = "main"  # the feature network of the evaluation's config; any other is called by its own name
Add = Callable[[Tensor], Tensor]  # the sum of a tensor over processes


class Value(NamedTuple):
    """A number of a record and how a table shows it. spread: keys of the ± or of the interval beside it."""

    key: str
    title: str
    format: str
    spread: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """One set of images by one feature network. stored: (N, d), where a metric asked for every feature."""

    statistics: Statistics
    stored: Tensor | None = None
    name: str = "the statistics"  # in errors
    cache: dict[Any, Any] = field(default_factory=dict)  # of what depends on this set alone

    @cached_property
    def gaussian(self) -> Gaussian:
        return self.statistics.gaussian(self.name)

    @property
    def features(self) -> Tensor:
        assert self.stored is not None, "the metric did not ask for stored features"
        return self.stored


@dataclass(frozen=True)
class Batch:
    """Images `first`, `first + 1`, ... as they come: uint8 (B, H, W, C) with features (B, d).

    teacher_images, teacher_features: of the same noise, for metrics that compare with a teacher. prompts: of
    each image, where the images have any.
    """

    first: int
    images: Tensor
    features: Tensor
    teacher_images: Tensor | None = None
    teacher_features: Tensor | None = None
    prompts: Sequence[str] | None = None


class Running(Protocol):
    """What a metric adds up while images come, where statistics and stored features are not enough."""

    def update(self, batch: Batch) -> None: ...

    def merge_across(self, add: Add) -> None:
        """Adds up all processes, each of which must call it, with images or without."""


class Labelled(NamedTuple):
    """labels: the class of each image, (N,) int64. classes: their names, where they are known."""

    labels: Tensor
    classes: Sequence[str] = ()


@dataclass(frozen=True)
class Inputs:
    """What a metric is computed from. compared: the reference, for metrics that need it. options: as
    `Metric.options` gave them. features: the main network. labels, reference_labels: of the images and of
    the reference, where they have any."""

    images: FeatureSet
    compared: FeatureSet | None
    options: Mapping[str, Any]
    features: str
    running: Any = None
    labels: Labelled | None = None
    reference_labels: Labelled | None = None

    @property
    def reference(self) -> FeatureSet:
        assert self.compared is not None, "the metric does without the reference"
        return self.compared


class Metric(Strict, ABC):
    """A number, or a few that belong together. Subclasses are final; their fields are keys of `evaluation`.

    name: in configs, on the command line and in records. values: its numbers, as tables show them. more: keys
    of numbers that only records hold. network: the features that it is of, MAIN or a name that
    `features.load` knows. with_teacher: whether it compares with a teacher's images of the same noise.
    with_prompts: whether it compares with what the images were to show. with_labels: whether images and
    reference must have class labels. with_reference: whether the images of the reference go through a network
    of its own. compares: whether it needs a reference at all.
    """

    name: ClassVar[str]
    values: ClassVar[tuple[Value, ...]]
    more: ClassVar[tuple[str, ...]] = ()
    network: ClassVar[str] = MAIN
    with_teacher: ClassVar[bool] = False
    with_prompts: ClassVar[bool] = False
    with_labels: ClassVar[bool] = False
    with_reference: ClassVar[bool] = True
    compares: ClassVar[bool] = True

    @property
    def stores_reference(self) -> bool:
        """Whether it needs every feature of the reference, and not only their mean and covariance."""
        return False

    @property
    def prefers_reference(self) -> bool:
        """Whether it uses them too where the reference is of images, though their statistics would do."""
        return False

    @property
    def stores_images(self) -> bool:
        """Whether it needs every feature of the images that are measured."""
        return False

    def weights(self) -> str | None:
        """File or folder of its own network's weights; None for where that network looks itself."""
        return None

    def check(self, network: nn.Module, name: str) -> None:
        """Raises UserError where the main feature network, called `name`, does not give what it needs."""

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises UserError for prompts that it cannot go by: it is asked before any image is drawn."""

    def check_labels(self, images: Labelled, reference: Labelled) -> None:
        """Raises UserError for labels that it cannot go by: it is asked before any image is measured."""

    def options(self, samples: int, reference: int | None) -> dict[str, Any]:
        """What its numbers depend on beside the features, for records. samples, reference: image counts.

        Raises UserError where they are too few: it is asked before any image is measured.
        """
        return {}

    def running(self, network: Any, count: int, device: torch.device) -> Running | None:
        """What it adds up over `count` images; None for nothing."""
        return None

    def notes(self, inputs: Inputs) -> Sequence[str]:
        """What a reader of its numbers must know of how they came about, a line each."""
        return ()

    @abstractmethod
    def compute(self, inputs: Inputs) -> dict[str, Any]:
        """Its numbers by key; None stands for an infinite one, which JSON cannot hold. Keys that are not in
        `values` or `more` are kept in records, and in nothing else."""
