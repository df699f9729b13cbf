"""The Inception Score, of class probabilities that are summed as they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffkd.errors import UserError


class InceptionScore(NamedTuple):
    """mean, std: over the splits."""

    mean: float
    std: float


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
        if not 1 <= splits <= count:
            raise UserError(f"the Inception Score of {splits} splits needs as many images; there are {count}")
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

    def merge_across(self, add: Callable[[Tensor], Tensor], classes: int) -> None:
        """Adds up all processes, each of which must call it, with images or without."""
        if self.p.shape[1] == 0:
            self.p = torch.zeros(len(self.bounds) - 1, classes, dtype=torch.float64)
        self.p, self.p_log_p = add(self.p), add(self.p_log_p)

    def score(self) -> InceptionScore:
        count = (self.bounds[1:] - self.bounds[:-1]).to(self.p)
        mean = self.p / count[:, None]
        divergence = self.p_log_p / count - torch.special.xlogy(mean, mean).sum(1)
        scores = divergence.exp()
        return InceptionScore(float(scores.mean()), float(scores.std(unbiased=False)))
