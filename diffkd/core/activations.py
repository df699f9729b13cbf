"""Outputs of a network's inner modules, captured by forward hooks that are removed afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def _features(module: nn.Module, output: Any) -> Any:
    if not isinstance(output, tuple):
        return output
    if hasattr(module, "to_q"):  # attention, which names the image first
        return output[0]
    streams = len(output) == 2 and isinstance(output[1], Tensor) and output[1].ndim == 3  # (B, tokens, C)
    return output[1] if streams else output[0]


@contextmanager
def capture_activations(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yields a mapping that the last forward pass fills: module name to output.

    Of a tuple it is the first; of the two streams of a transformer's block, text and then image, it is the
    image's tokens, as it is of the attention inside, which has them the other way round.

    The hooks are removed on leaving, whatever happens inside.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[name] = _features(module, output)

        return hook

    bare = getattr(network, "module", network)  # unwrapped from DistributedDataParallel
    with ExitStack() as stack:
        for name in names:
            stack.callback(bare.get_submodule(name).register_forward_hook(keep(name)).remove)
        yield outputs


@contextmanager
def no_gradients_after(network: nn.Module, name: str) -> Iterator[None]:
    """Forward passes keep nothing for gradients once this module has been called: what it outputs has them,
    what the network makes of that has none."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        torch.set_grad_enabled(False)

    bare = getattr(network, "module", network)
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))  # which leaving restores
        stack.callback(bare.get_submodule(name).register_forward_hook(hook).remove)
        yield
