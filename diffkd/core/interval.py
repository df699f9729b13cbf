"""A second number for networks that take one time: how far a step goes.

Students whose one step may have any length, u(x_t, t, r), need t - r beside t. Its embedding is added to that
of the time, inside a stock network, while it trains; where every block embeds the time, to each. On the even
grid of N steps the length is 1 / N in each, so its embedding is a constant, which `folded` adds to the bias
of the time's own: what is saved is the stock network, and nothing is lost.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.errors import UserError
from diffkd.io.text import a_or_an

NAME = "interval_embedding"  # of the module, inside the network
WAVES = 8  # of the number, with 1/2, 1, ..., 64 periods over [0, 1]


class IntervalEmbedding(nn.Module):
    """(B,) in [0, 1] -> (B, width) for each of some places: a small network that is 0 for every number until
    it is trained."""

    def __init__(self, width: int, places: int = 1, hidden: int = 128) -> None:
        super().__init__()
        self.width = width
        self.value: Tensor | None = None  # (B,), of the call that is under way
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same in every process
            self.first, self.second = nn.Linear(2 * WAVES, hidden), nn.Linear(hidden, places * width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, value: Tensor, place: int = 0) -> Tensor:
        frequencies = torch.pi * 2.0 ** torch.arange(WAVES, device=value.device, dtype=torch.float64)
        angles = value.double()[:, None] * frequencies
        # small amplitudes for fast waves: the embedding's slope is that of a few of the slow ones
        waves = torch.cat([angles.sin(), angles.cos() - 1], 1) / torch.cat([frequencies, frequencies])
        hidden = nn.functional.silu(self.first(waves.to(self.first.weight.dtype)))
        own = slice(place * self.width, (place + 1) * self.width)
        return nn.functional.linear(hidden, self.second.weight[own], self.second.bias[own])

    @contextmanager
    def told(self, value: Tensor | None) -> Iterator[None]:
        """Around a call of the network: the length of each example's step, or None. It is of this call alone:
        kept, it would be copied with the network, and hold on to the graph of a derivative."""
        self.value = value
        try:
            yield
        finally:
            self.value = None


class _Added:
    """Hook of one of the time's embeddings."""

    def __init__(self, module: IntervalEmbedding, place: int) -> None:
        self.module, self.place = module, place

    def __call__(self, time: nn.Module, args: Any, output: Tensor) -> Tensor:
        value = self.module.value
        return output if value is None else output + self.module(value, self.place).to(output.dtype)


def check(network: nn.Module) -> None:
    """Raises UserError where the network has no time embedding of a known kind."""
    _time_embeddings(network)


def attach(network: nn.Module) -> None:
    """Gives the network an interval embedding, in place. Raises UserError as `check` does."""
    times = _time_embeddings(network)
    module = IntervalEmbedding(times[0].linear_2.out_features, len(times)).to(times[0].linear_2.weight)
    network.add_module(NAME, module)
    for place, time in enumerate(times):
        time.register_forward_hook(_Added(module, place))


def attached(network: nn.Module) -> IntervalEmbedding | None:
    found = getattr(getattr(network, "module", network), NAME, None)
    return found if isinstance(found, IntervalEmbedding) else None


def check_recomputed(network: nn.Module) -> None:
    """Raises UserError for a network with an interval embedding that computes its blocks again for their
    gradients, where each has a time embedding of its own: by then the step's length is forgotten."""
    if attached(network) is not None and len(_time_embeddings(network)) > 1:
        raise UserError(
            f"training.gradient_checkpointing does not work for {a_or_an(type(network).__name__)} that takes "
            "the length of its steps, as this method wants; leave it out"
        )


@torch.no_grad()
def folded(network: nn.Module, value: float) -> nn.Module:
    """The network that takes this interval always and needs no embedding of it. It shares the weights of the
    given one, but for the bias that the embedding becomes a part of."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    made = copy.deepcopy(network, shared)
    module = attached(made)
    assert module is not None
    for place, time in enumerate(_time_embeddings(made)):
        number = torch.tensor([value], dtype=torch.float64, device=time.linear_2.weight.device)
        constant = module(number, place)[0]
        bias = time.linear_2.bias
        time.linear_2.bias = nn.Parameter(constant if bias is None else (bias + constant).to(bias))
        hooks = time._forward_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Added)]:
            del hooks[key]
    delattr(made, NAME)
    return made


def _time_embeddings(network: nn.Module) -> list[Any]:
    """diffusers' TimestepEmbedding of the time: the first that the network has, and those that other blocks
    call the same."""
    from diffusers.models.embeddings import TimestepEmbedding

    found = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, TimestepEmbedding) and getattr(module, "post_act", None) is None
    }
    if not found:
        raise UserError(
            f"{a_or_an(type(network).__name__)} has no time embedding that a second time could be added to; "
            "use a method that needs none, such as progressive, consistency or dmd2"
        )
    first = next(iter(found)).rpartition(".")[2]
    return [module for name, module in found.items() if name.rpartition(".")[2] == first]
