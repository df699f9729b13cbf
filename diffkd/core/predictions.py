"""What networks output, read as x0 and eps and written from them."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from diffkd.errors import UserError

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]
PREDICTIONS: tuple[str, ...] = ("epsilon", "v_prediction", "sample", "flow")


def read_prediction(prediction: str, x_t: Any, output: Any, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    """Any network output as (x0, eps), each shaped like x_t: tensors, or numbers for linear coefficients.

    v = alpha eps - sigma x0 (Salimans & Ho 2022, appendix D), where alpha² + sigma² = 1; flow: u = eps - x0
    (Liu et al. 2022).
    """
    if prediction == "epsilon":
        return (x_t - sigma * output) / alpha, output
    if prediction == "v_prediction":
        return alpha * x_t - sigma * output, alpha * output + sigma * x_t
    if prediction == "sample":
        return output, (x_t - alpha * output) / sigma
    if prediction == "flow":
        x0 = (x_t - sigma * output) / (alpha + sigma)
        return x0, x0 + output
    raise UserError(f"prediction type {prediction!r} is unknown; use one of {', '.join(PREDICTIONS)}")


def write_prediction(prediction: str, x_t: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The network output that stands for x0 at x_t: the inverse of `read_prediction` (sigma > 0)."""
    if prediction == "sample":
        return x0
    return written(prediction, x0, (x_t - alpha * x0) / sigma, alpha, sigma)


def written(prediction: str, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The network output that `read_prediction` reads as x0 and eps, shaped like them."""
    if prediction == "sample":
        return x0
    if prediction == "epsilon":
        return eps
    if prediction == "v_prediction":
        return alpha * eps - sigma * x0
    if prediction == "flow":
        return eps - x0
    raise UserError(f"prediction type {prediction!r} is unknown; use one of {', '.join(PREDICTIONS)}")
