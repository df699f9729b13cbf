"""The interval embedding: nothing until it is trained, found in wrapped networks, folded without loss."""

import copy

import pytest
import torch
from torch import nn

from diffkd.core import interval
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule
from diffkd.errors import UserError
from tests.tiny import student

COSINE = Schedule.cosine(64)
X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.25, 0.5, 1.0]).double()
LABELS = torch.tensor([0, 1, 2])


def trained():
    """A student whose embedding says something."""
    made = student(3, "v_prediction", COSINE)
    interval.attach(made.network)
    generator = torch.Generator().manual_seed(1)
    for parameter in interval.attached(made.network).parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return made


@torch.no_grad()
def output(denoiser, length=None):
    more = {} if length is None else {"interval": torch.full((3,), length, dtype=torch.float64)}
    return denoiser.output(X, T, class_labels=LABELS, **more)


def test_it_changes_nothing_until_it_is_trained():
    made = student(3, "v_prediction", COSINE)
    before, names = output(made), set(made.network.state_dict())
    state = torch.get_rng_state()
    interval.attach(made.network)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(output(made), before) and torch.equal(output(made, 0.5), before)
    added = set(made.network.state_dict()) - names
    assert {name.partition(".")[0] for name in added} == {interval.NAME}
    again = student(3, "v_prediction", COSINE)
    interval.attach(again.network)
    same = zip(made.network.parameters(), again.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)  # in every process


def test_each_call_has_its_own_length_or_none():
    made = trained()
    plain = output(made)
    half, all_of_it = output(made, 0.5), output(made, 1.0)
    assert not torch.equal(half, all_of_it) and not torch.equal(half, plain)
    assert torch.equal(output(made), plain) and torch.equal(output(made, 0.5), half)
    with torch.no_grad():
        lengths = torch.tensor([0.5, 1.0, 0.5]).double()
        mixed = made.output(X, T, class_labels=LABELS, interval=lengths)
    assert torch.allclose(mixed, torch.stack([half[0], all_of_it[1], half[2]]), atol=1e-6)


@pytest.mark.parametrize("length", [1.0, 0.5, 1 / 64])
def test_folded_it_is_the_stock_network_that_takes_this_length(length):
    made = trained()
    expected, before = output(made, length), copy.deepcopy(made.network.state_dict())
    network = interval.folded(made.network, length)
    stock = student(3, "v_prediction", COSINE).network
    assert network.state_dict().keys() == stock.state_dict().keys() and type(network) is type(stock)
    assert not any(module._forward_hooks for module in network.modules())
    found = output(Denoiser(network, COSINE, "v_prediction"))
    assert torch.allclose(found, expected, atol=2e-6)
    # and the network that learns is as it was
    assert all(torch.equal(before[key], value) for key, value in made.network.state_dict().items())
    assert torch.equal(output(made, length), expected)


def test_a_copy_has_an_embedding_of_its_own():
    made = trained()
    twin = copy.deepcopy(made)
    before = output(made, 0.5)
    assert torch.equal(output(twin, 0.5), before)
    for parameter in interval.attached(twin.network).parameters():
        parameter.data.zero_()
    assert torch.equal(output(made, 0.5), before) and not torch.equal(output(twin, 0.5), before)


def test_a_wrapped_network_has_its_embedding():
    """As DDP and DeepSpeed wrap it, whose own attributes do not reach through."""

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    made = trained()
    expected = output(made, 0.5)
    dtype = made.network.dtype
    made.network = Wrapper(made.network)
    assert made.dtype == dtype and torch.equal(output(made, 0.5), expected)


def test_guidance_reaches_both_halves_of_the_batch():
    made = trained()
    made.num_classes, made.null_label = 2, 2
    lengths = torch.full((3,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        found = made.output(X, T, guidance=2.0, class_labels=LABELS % 2, interval=lengths)
        given = made.output(X, T, class_labels=LABELS % 2, interval=lengths)
        null = made.output(X, T, class_labels=torch.full_like(LABELS, 2), interval=lengths)
    assert torch.allclose(found, 2 * given - null, atol=1e-5)


def test_its_slope_is_bounded():
    """The derivative by the length, which MeanFlow multiplies with, is not ruled by the fastest wave."""
    module = interval.IntervalEmbedding(8)
    nn.init.normal_(module.second.weight, std=128**-0.5)
    value = torch.linspace(0, 1, 2001, dtype=torch.float64)
    with torch.no_grad():
        slope = (module(value).diff(dim=0) * 2000).norm(dim=1)
        size = module(value).norm(dim=1).max()
    assert slope.max() < 10 * size


def test_a_network_without_a_time_embedding_is_refused():
    with pytest.raises(UserError, match="a Conv2d has no time embedding.*use a method that needs none"):
        interval.attach(nn.Conv2d(1, 1, 1))
    with pytest.raises(UserError, match="a Conv2d has no time embedding"):
        interval.check(nn.Conv2d(1, 1, 1))
