"""The random numbers of training: seeds, times, noise and dropped labels."""

import itertools

import pytest
import torch

from diffkd.core import noise
from diffkd.core.noise import derived_seed
from diffkd.core.schedules import Schedule

COSINE = Schedule.cosine(64)


def test_seeds_differ():
    seeds = {derived_seed(*parts) for parts in itertools.product(range(4), range(4), range(20), range(4))}
    assert len(seeds) == 4 * 4 * 20 * 4 and all(0 <= s < 2**63 for s in seeds)


def test_times_noise_and_dropped_labels_have_their_distributions():
    rng = torch.Generator().manual_seed(0)
    t, s = noise.grid_times(4000, 5, rng, torch.device("cpu"))
    assert t.dtype == torch.float64 and torch.allclose(t - s, torch.tensor(0.2).double(), atol=1e-12)
    assert sorted(set(t.tolist())) == [i / 5 for i in range(1, 6)]
    assert all(abs((t == i / 5).float().mean() - 0.2) < 0.03 for i in range(1, 6))
    t, s = noise.steps_of_grids(4000, [4, 1], rng, torch.device("cpu"))
    assert {(a, b) for a, b in zip(t.tolist(), s.tolist(), strict=True)} == {
        (1.0, 0.0), *((i / 4, (i - 1) / 4) for i in range(1, 5))
    }  # fmt: skip
    assert (
        abs(((t == 1) & (s == 0)).float().mean() - 1 / 2) < 0.04
        and abs((t == 0.5).float().mean() - 1 / 8) < 0.03
    )
    x_t = noise.add_noise(COSINE, torch.ones(4000, 1, 2, 2), torch.full((4000,), 0.25).double(), rng)
    alpha2 = COSINE.alphas_cumprod[15].item()
    assert x_t.mean() == pytest.approx(alpha2**0.5, abs=0.02) and x_t.var() == pytest.approx(
        1 - alpha2, rel=0.05
    )
