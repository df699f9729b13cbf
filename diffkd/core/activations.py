"""What a network's inner modules put out, taken by forward hooks that are gone afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def capture_activations(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of these modules in the last forward pass within, by name; of a tuple, its first.

    The network is as it was before once this ends, whatever happens in it.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    bare = getattr(network, "module", network)  # what several processes wrap around it
    with ExitStack() as stack:
        for name in names:
            stack.callback(bare.get_submodule(name).register_forward_hook(keep(name)).remove)
        yield found
