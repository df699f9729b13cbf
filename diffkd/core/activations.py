"""Outputs of a network's inner modules, captured by forward hooks that are removed afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def capture_activations(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yields a mapping that the last forward pass fills: module name to output (the first one of a tuple).

    The hooks are removed on leaving, whatever happens inside.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    bare = getattr(network, "module", network)  # unwrapped from DistributedDataParallel
    with ExitStack() as stack:
        for name in names:
            stack.callback(bare.get_submodule(name).register_forward_hook(keep(name)).remove)
        yield outputs
