"""A second number for networks that take one time: how far a step goes.

Students whose one step may have any length, u(x_t, t, r), need t - r beside t. Its embedding is added to that
of the time, inside a stock network, while it trains. On the even grid of N steps the length is 1 / N in each,
so its embedding is a constant, which `folded` adds to the bias of the time's own: what is saved is the stock
network, and nothing is lost.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.errors import UserError

NAME = "interval_embedding"  # of the module, inside the network
WAVES = 8  # of the number, with 1/2, 1, ..., 64 periods over [0, 1]


class IntervalEmbedding(nn.Module):
    """(B,) in [0, 1] -> (B, width): a small network that is 0 for every number until it is trained."""

    def __init__(self, width: int, hidden: int = 128) -> None:
        super().__init__()
        self.value: Tensor | None = None  # (B,), of the call that is under way
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same in every process
            self.first, self.second = nn.Linear(2 * WAVES, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, value: Tensor) -> Tensor:
        frequencies = torch.pi * 2.0 ** torch.arange(WAVES, device=value.device, dtype=torch.float64)
        angles = value.double()[:, None] * frequencies
        # small amplitudes for fast waves: the embedding's slope is that of a few of the slow ones
        waves = torch.cat([angles.sin(), angles.cos() - 1], 1) / torch.cat([frequencies, frequencies])
        weight = self.first.weight
        embedded: Tensor = self.second(nn.functional.silu(self.first(waves.to(weight.dtype))))
        return embedded

    def added(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Hook of the time's embedding. The value is of this call alone: kept, it would be copied with the
        network, and hold on to the graph of a derivative."""
        value, self.value = self.value, None
        return output if value is None else output + self(value).to(output.dtype)


def check(network: nn.Module) -> None:
    """Raises UserError where the network has no time embedding of a known kind."""
    _time_embedding(network)


def attach(network: nn.Module) -> None:
    """Gives the network an interval embedding, in place. Raises UserError as `check` does."""
    time = _time_embedding(network)
    module = IntervalEmbedding(time.linear_2.out_features).to(time.linear_2.weight)
    network.add_module(NAME, module)
    time.register_forward_hook(module.added)


def attached(network: nn.Module) -> IntervalEmbedding | None:
    found = getattr(getattr(network, "module", network), NAME, None)
    return found if isinstance(found, IntervalEmbedding) else None


@torch.no_grad()
def folded(network: nn.Module, value: float) -> nn.Module:
    """A copy of the network that takes this interval always and needs no embedding of it."""
    made = copy.deepcopy(network)
    module, time = attached(made), _time_embedding(made)
    assert module is not None
    constant = module(torch.tensor([value], dtype=torch.float64, device=time.linear_2.weight.device))[0]
    if time.linear_2.bias is None:
        time.linear_2.bias = nn.Parameter(torch.zeros_like(constant))
    time.linear_2.bias += constant
    hooks = time._forward_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is module]:
        del hooks[key]
    delattr(made, NAME)
    return made


def _time_embedding(network: nn.Module) -> Any:
    """diffusers' TimestepEmbedding of the time: the first that the network has."""
    from diffusers.models.embeddings import TimestepEmbedding

    for module in network.modules():
        if isinstance(module, TimestepEmbedding) and getattr(module, "post_act", None) is None:
            return module
    raise UserError(
        f"a {type(network).__name__} has no time embedding that a second time could be added to; use a "
        "method that needs none, such as progressive, consistency or dmd2"
    )
