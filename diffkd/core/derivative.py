"""Derivatives of a network along a direction of its inputs: forward-mode differentiation, or differences."""

from __future__ import annotations

import re
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
OF_DERIVATIVES = re.compile("forward.?(mode|AD)|functorch|jvp", re.IGNORECASE)  # in errors of torch
STEP = 5e-3  # of a difference, in tangents: its errors are the step's square, and rounding over the step


@torch.no_grad()
def directional(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    tangents: Sequence[Tensor],
    how: Derivative = "jvp",
    *,
    network: nn.Module | None = None,
    step: float | tuple[Tensor, Tensor] = STEP,
) -> Tensor:
    """d/dh function(*(inputs + h tangents)) at h = 0, shaped like the function's value, without gradients and
    in full float32, whatever the training's precision.

    "jvp" is exact. "difference" is (f(h) - f(-h)) / 2h, two calls: for networks with parts that have no
    forward-mode derivative, and to smooth the fast waves of an embedded time. step: h, or how far each
    example goes behind and ahead, (B,) both. network: what the function calls, while it is trained. Raises
    UserError where "jvp" finds no derivative.
    """
    with full_float32(inputs[0].device.type, network):
        if how == "jvp":
            return _jvp(function, inputs, tangents)
        if isinstance(step, tuple):
            behind, ahead = step
        else:
            each = torch.full((len(inputs[0]),), step, dtype=torch.float64, device=inputs[0].device)
            behind = ahead = each

        def at(h: Tensor) -> Tensor:
            return function(*(x + _shaped(h, x) * v for x, v in zip(inputs, tangents, strict=True)))

        difference = at(ahead) - at(-behind)
        return difference / _shaped(ahead + behind, difference)


def _shaped(h: Tensor, like: Tensor) -> Tensor:
    return h.to(like).reshape(-1, *[1] * (like.ndim - 1))


def _jvp(function: Callable[..., Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    try:
        with sdpa_kernel(SDPBackend.MATH), _Differentiable():  # the one attention with such a derivative
            derivative: Tensor = torch.func.jvp(function, tuple(inputs), tuple(tangents))[1]
    except (NotImplementedError, RuntimeError) as error:
        if not isinstance(error, NotImplementedError) and not OF_DERIVATIVES.search(str(error)):
            raise  # not of the derivative, such as a lack of memory
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
