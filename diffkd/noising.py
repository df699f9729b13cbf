"""What every method begins with: random times of a grid, noised data, hidden labels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffkd.prefetch import moved
from diffkd.schedules import Schedule


def grid_times(count: int, steps: int, rng: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random t of the grid i / steps, i = 1, ..., steps, and the s one step before each: (B,) float64."""
    i = moved(torch.randint(1, steps + 1, (count,), generator=rng), device)
    return i.double() / steps, (i - 1).double() / steps


def noised(schedule: Schedule, x0: Tensor, t: Tensor, rng: torch.Generator) -> Tensor:
    """x_t = alpha(t) x0 + sigma(t) eps. x0: (B, C, H, W); t: (B,)."""
    eps = moved(torch.randn(x0.shape, generator=rng), x0.device)
    alpha, sigma = schedule.at(t, like=x0)
    noisy: Tensor = alpha * x0 + sigma * eps
    return noisy


def some_hidden(
    cond: Mapping[str, Tensor], null_label: int | None, share: float, rng: torch.Generator
) -> dict[str, Tensor]:
    """The conditioning with that share of its labels replaced by the null label, where there is one."""
    found = dict(cond)
    if "class_labels" in found and null_label is not None and share > 0:
        labels = found["class_labels"]
        hidden = moved(torch.rand(len(labels), generator=rng) < share, labels.device)
        found["class_labels"] = torch.where(hidden, null_label, labels)
    return found
