"""The Inception Score, from class probabilities that are summed batch by batch."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from diffkd.errors import UserError
from diffkd.io.naming import called
from diffkd.metrics.base import Add, Batch, Inputs, Metric, Running, Value

SPLIT_SEED = 0


class InceptionScore(NamedTuple):
    """mean, std: over the splits; std is None for one split."""

    mean: float
    std: float | None


def inception_score(probs: Tensor | np.ndarray, splits: int = 10) -> InceptionScore:
    """exp of the mean KL(p(y|x) ‖ p(y)), by splits of consecutive images (Salimans et al. 2016, section 4).

    probs: (N, classes), rows that sum to 1. std with divisor `splits`.
    """
    sums = ScoreSums(len(probs), splits)
    sums.update(torch.as_tensor(probs), 0)
    return sums.score()


class ScoreSums:
    """All that the score needs of `count` images: per split, the sum of p and of p log p. Float64."""

    def __init__(self, count: int, splits: int = 10, order: Tensor | None = None) -> None:
        """order: (count,), the place of each image in the order that is split; default their own."""
        if not 1 <= splits <= count // 2:  # a split of one image has a score of 1, whatever the image
            raise UserError(
                f"the Inception Score of {splits} splits needs 2 images in each; there are {count}; "
                f"use more images, or fewer splits ({called('evaluation.is_splits')})"
            )
        self.bounds = torch.tensor([i * count // splits for i in range(splits + 1)])
        place = torch.arange(count) if order is None else order
        self.split_of = torch.searchsorted(self.bounds, place, right=True) - 1
        self.p = torch.zeros(splits, 0, dtype=torch.float64)
        self.p_log_p = torch.zeros(splits, dtype=torch.float64)

    def update(self, probs: Tensor, first: int) -> None:
        """probs: (B, classes) of the images `first`, `first + 1`, ..."""
        p = probs.double()
        if self.p.shape[1] == 0:
            self.p = p.new_zeros(len(self.bounds) - 1, p.shape[1])
            self.p_log_p = self.p_log_p.to(p.device)
        self.split_of = self.split_of.to(p.device)
        # a product and not index_add_, whose order of additions on a GPU is not the same twice
        member = torch.nn.functional.one_hot(self.split_of[first : first + len(p)], len(self.p)).double()
        self.p += member.T @ p
        self.p_log_p += member.T @ torch.special.xlogy(p, p).sum(1)

    def merge_across(self, add: Add, classes: int) -> None:
        """Adds up all processes, each of which must call it, with images or without."""
        if self.p.shape[1] == 0:
            self.p = torch.zeros(len(self.bounds) - 1, classes, dtype=torch.float64)
        self.p, self.p_log_p = add(self.p), add(self.p_log_p)

    def score(self) -> InceptionScore:
        count = (self.bounds[1:] - self.bounds[:-1]).to(self.p)
        mean = self.p / count[:, None]
        divergence = self.p_log_p / count - torch.special.xlogy(mean, mean).sum(1)
        scores = divergence.exp()
        spread = float(scores.std(unbiased=False)) if len(scores) > 1 else None
        return InceptionScore(float(scores.mean()), spread)


def split_order(count: int) -> Tensor:
    """A fixed random order of images for the splits: images often come class by class, and a split of one
    class has a score of 1."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))


class _RunningScore:
    """Sums of the class probabilities that a feature network gives."""

    def __init__(self, network: Any, count: int, splits: int) -> None:
        self.network, self.sums = network, ScoreSums(count, splits, split_order(count))

    def update(self, batch: Batch) -> None:
        self.sums.update(self.network.probabilities(batch.features), batch.first)

    def merge_across(self, add: Add) -> None:
        weight = next(self.network.parameters(), torch.zeros(0, dtype=torch.float64))
        none = torch.zeros(0, self.network.num_features, dtype=weight.dtype, device=weight.device)
        self.sums.merge_across(add, self.network.probabilities(none).shape[1])


class Score(Metric):
    """Inception Score, mean and spread over splits."""

    name: ClassVar[str] = "is"
    values: ClassVar[tuple[Value, ...]] = (Value("is", "Inception Score", ".3f", ("is_std",)),)
    compares: ClassVar[bool] = False

    is_splits: int = Field(10, ge=1, description="parts that the Inception Score is the mean over")

    def check(self, network: nn.Module, name: str) -> None:
        if not hasattr(network, "probabilities"):
            raise UserError(f"the Inception Score needs class probabilities, which {name} does not give")

    def options(self, samples: int, reference: int | None) -> dict[str, Any]:
        ScoreSums(samples, self.is_splits)  # refuses too few
        return {"splits": self.is_splits, "seed": SPLIT_SEED}

    def running(self, network: Any, count: int, device: torch.device) -> Running:
        return _RunningScore(network, count, self.is_splits)

    def compute(self, inputs: Inputs) -> dict[str, float | None]:
        found = inputs.running.sums.score()
        return {"is": found.mean} | ({} if found.std is None else {"is_std": found.std})
