"""Derivatives of a network along a direction of its inputs: forward-mode differentiation, or differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from diffkd.core.precision import full_float32
from diffkd.errors import UserError
from diffkd.io.naming import called
from diffkd.io.text import reason

Derivative = Literal["jvp", "difference"]
STEP = 5e-3  # of a difference, in tangents: its errors are the step's square, and rounding over the step


@torch.no_grad()
def directional(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    tangents: Sequence[Tensor],
    how: Derivative = "jvp",
    *,
    network: nn.Module | None = None,
) -> Tensor:
    """d/dh function(*(inputs + h tangents)) at h = 0, shaped like the function's value, without gradients and
    in full float32, whatever the training's precision.

    "jvp" is exact, and costs about two calls. "difference" is (f(h) - f(-h)) / 2h, two calls, for networks
    with parts that have no forward-mode derivative; the function must be defined on both sides. Raises
    UserError for such a network with "jvp". network: what the function calls, while it is trained.
    """
    with full_float32(inputs[0].device.type, network):
        if how == "jvp":
            return _jvp(function, inputs, tangents)
        ahead = function(*(x + STEP * v for x, v in zip(inputs, tangents, strict=True)))
        behind = function(*(x - STEP * v for x, v in zip(inputs, tangents, strict=True)))
        return (ahead - behind) / (2 * STEP)


def _jvp(function: Callable[..., Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    try:
        with sdpa_kernel(SDPBackend.MATH), _Differentiable():  # the one attention with such a derivative
            derivative: Tensor = torch.func.jvp(function, tuple(inputs), tuple(tangents))[1]
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            f"the network has a part without a forward-mode derivative ({reason(error)}); set "
            f"{called('method.derivative')} to difference"
        ) from error
    return derivative


class _Differentiable(TorchFunctionMode):
    """Group normalisation of contiguous inputs only: its forward-mode derivative takes a view of them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.group_norm:
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        return func(*args, **(kwargs or {}))
