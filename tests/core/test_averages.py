"""Averages of weights that targets are taken from."""

import torch
from torch import nn

from diffkd.core.averages import follow


def test_a_copy_follows_its_network():
    """After n updates of a network that stands still, decay^n of what it was is left."""
    average, network = nn.Linear(3, 2), nn.Linear(3, 2)
    first = [p.detach().clone() for p in average.parameters()]
    before = [p.detach().clone() for p in network.parameters()]
    for _ in range(3):
        follow(average, network, 0.5)
    for mine, was, theirs, then in zip(
        average.parameters(), first, network.parameters(), before, strict=True
    ):
        assert torch.allclose(mine, was / 8 + 7 / 8 * theirs, atol=1e-6) and torch.equal(theirs, then)
