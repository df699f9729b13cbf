"""The random numbers of training: seeds of every update; times and noise drawn from them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from diffkd.core.schedules import Schedule
from diffkd.io.prefetch import to_device


def derived_seed(*parts: int) -> int:
    """A 63-bit seed from (seed, stage, update, micro-batch): nearby numbers give unrelated ones."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(key: tuple[int, int, int], micro: int) -> torch.Generator:
    """The generator of one micro-batch. key: (seed, stage, update)."""
    return torch.Generator().manual_seed(derived_seed(*key, micro))


def grid_times(count: int, steps: int, rng: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random t of the grid i / steps, i = 1, ..., steps, and the s one step before each: (B,) float64."""
    i = to_device(torch.randint(1, steps + 1, (count,), generator=rng), device)
    return i.double() / steps, (i - 1).double() / steps


def steps_of_grids(
    count: int, grids: Sequence[int], rng: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Random steps of several even grids, each step count of `grids` as often: t and s, (B,) float64."""
    total = torch.tensor(grids, dtype=torch.float64)[torch.randint(len(grids), (count,), generator=rng)]
    i = (torch.rand(count, generator=rng, dtype=torch.float64) * total).floor()
    return to_device((i + 1) / total, device), to_device(i / total, device)


def add_noise(schedule: Schedule, x0: Tensor, t: Tensor, rng: torch.Generator) -> Tensor:
    """x_t = alpha(t) x0 + sigma(t) eps. x0: (B, C, H, W); t: (B,)."""
    eps = to_device(torch.randn(x0.shape, generator=rng), x0.device)
    alpha, sigma = schedule.at(t, like=x0)
    x_t: Tensor = alpha * x0 + sigma * eps
    return x_t
