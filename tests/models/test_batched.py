"""Networks that take lists as functions of tensors: the stock network's output, for any prompts."""

from __future__ import annotations

import pytest
import torch

from diffkd.core.denoiser import Denoiser
from diffkd.core.flow_schedule import FlowSchedule
from diffkd.models.exports import batched
from diffkd.models.families import lumina2, qwen_image, z_image
from diffkd.models.masked_prompts import MASK, STATES
from tests import masked_pipelines
from tests.masked_pipelines import CHANNELS, WIDTH

FAMILIES = {"lumina2": lumina2, "z_image": z_image, "qwen_image": qwen_image}
BOUND = 3e-6  # of the largest output


@pytest.fixture(scope="module", params=FAMILIES)
def network(request):
    """Its name, and it itself, far from its initialisation."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = masked_pipelines.network(request.param).eval().requires_grad_(False)
        for parameter in made.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return request.param, made


def denoiser(network, size, tokens):
    kind, made = network
    example = {STATES: torch.zeros(1, tokens, WIDTH), MASK: torch.ones(1, tokens)}
    return Denoiser(
        made, FlowSchedule(), "flow", shape=(CHANNELS, *size), call=FAMILIES[kind].call, example=example
    )


def given(size, tokens, kept, seed=0):
    """Latents, times and prompts of these masks, with numbers in their padding."""
    rng = torch.Generator().manual_seed(seed)
    states = torch.randn(len(kept), tokens, WIDTH, generator=rng)
    x = torch.randn(len(kept), CHANNELS, *size, generator=rng)
    return x, torch.linspace(999.0, 3.0, len(kept)), {STATES: states, MASK: kept.float()}


def prompts(tokens, lengths):
    return torch.arange(tokens) < torch.tensor(lengths)[:, None]


def both(network, size, tokens, kept):
    """The stock network's output and that of tensors, in units of the largest."""
    whole = denoiser(network, size, tokens)
    x, time, cond = given(size, tokens, kept)
    stock = whole.call(whole.network, x, time, cond)
    found = batched.call(batched.of(whole), x, time, cond)
    assert found.shape == stock.shape and stock.std() > 0.1
    return stock / stock.abs().max(), found / stock.abs().max()


@pytest.mark.parametrize(("size", "tokens"), [((8, 8), 64), ((12, 8), 40), ((8, 16), 70)])
def test_the_output_is_that_of_the_stock_network(network, size, tokens):
    """Images of 16, 24 and 32 tokens, prompts from one token to all there is room for: at, below and above
    the multiples of 32 that Z-Image fills up to."""
    stock, found = both(network, size, tokens, prompts(tokens, [1, 31, 32, 33, tokens]))
    assert (stock - found).abs().max() <= BOUND
    alike, found = both(network, size, tokens, prompts(tokens, [tokens] * 2))  # where stock has no mask
    assert (alike - found).abs().max() <= BOUND


def test_tokens_may_lie_anywhere(network):
    """Where the stock pipeline's do: padding of Z-Image on the left, tokens that are left out of Qwen's."""
    if network[0] == "lumina2":
        return  # which takes the first of them, as many as there are
    kept = torch.rand(4, 64, generator=torch.Generator().manual_seed(1)) < 0.6
    stock, found = both(network, (8, 8), 64, kept)
    assert (stock - found).abs().max() <= BOUND
    shorter, _ = both(network, (8, 8), 64, kept & prompts(64, [30] * 4))
    assert (stock - shorter).abs().max() > 1e-3


def test_the_students_network_stays_as_it_is(network):
    """Its own rotary embeddings too, and no weight has a second name."""
    whole = denoiser(network, (8, 8), 40)
    before = {name: type(module) for name, module in whole.network.named_modules()}
    made = batched.of(whole)
    assert {name: type(module) for name, module in whole.network.named_modules()} == before
    assert len(made.state_dict()) == len(whole.network.state_dict())
    assert batched.of(Denoiser(torch.nn.Linear(1, 1), FlowSchedule(), "flow", shape=(1, 2, 2))) is None
