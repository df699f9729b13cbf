"""One model on two schedules: states and times of one that are states and times of another.

x_t / alpha = x0 + (sigma / alpha) eps, so a denoiser of one schedule is one of any other, at the time of the
same sigma / alpha and with the state scaled. alpha + sigma stands for alpha, which is 0 at zero terminal SNR.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from diffkd.core.noise_schedule import Schedule, Time
from diffkd.core.predictions import read_prediction, written
from diffkd.errors import UserError

_LEVEL_TOLERANCE = 1e-9  # of sigma / (alpha + sigma), that ends of two schedules are the same


def time_on(source: Schedule, target: Schedule, t: Tensor) -> Tensor:
    """The time on `target` of the sigma / alpha that `source` has at t: (B,) -> float64 (B,).

    Where the target does not reach it, its end 1: see `check_reaches`.
    """
    return target.time_of(source.half_log_snr(t))


def state_on(source: Schedule, target: Schedule, x_t: Tensor, t: Time, s: Time) -> Tensor:
    """The state on `target` at s that is x_t on `source` at t, s = time_on(source, target, t): (B, ...)."""
    alpha_t, sigma_t = source.at(t, like=x_t)
    alpha_s, sigma_s = target.at(s, like=x_t)
    moved: Tensor = (alpha_s + sigma_s) / (alpha_t + sigma_t) * x_t
    return moved


def output_on(
    source: Schedule,
    target: Schedule,
    predictions: tuple[str, str],
    x_t: Tensor,
    output: Tensor,
    t: Time,
    s: Time,
) -> Tensor:
    """What a network of predictions[1] on `target` outputs at s where one of predictions[0] on `source` gives
    this output at x_t and t: (B, ...)."""
    x0, eps = read_prediction(predictions[0], x_t, output, *source.at(t, like=x_t))
    found: Tensor = written(predictions[1], x0, eps, *target.at(s, like=x_t))
    return found


def output_of_another(
    ask: Callable[[Tensor, Time], Tensor],
    source: Schedule,
    target: Schedule,
    predictions: tuple[str, str],
    x_t: Tensor,
    t: Time,
    s: Time,
) -> Tensor:
    """What a model of predictions[0] on `source` says of a state x_t of `target` at t, as an output of
    predictions[1] there: (B, ...) in the dtype of x_t.

    ask: the model's output at a state and a time of its own. s: the time on `source`, which is t where the
    two are one schedule: then the state is its own, and so is the output of an equal type.
    """
    if source is not target:
        x_s = state_on(target, source, x_t, t, s)
        return output_on(source, target, predictions, x_s, ask(x_s, s).to(x_t.dtype), s, t)
    output = ask(x_t, t).to(x_t.dtype)
    if predictions[0] == predictions[1]:
        return output
    return output_on(source, target, predictions, x_t, output, t, t)


def check_reaches(source: Schedule, target: Schedule) -> None:
    """Raises UserError where a model of `source` is to be asked for noise levels that only `target` has."""
    ends = [schedule.numbers(1.0) for schedule in (source, target)]
    has, needs = (sigma / (alpha + sigma) for alpha, sigma in ends)
    if needs > has + _LEVEL_TOLERANCE:
        (alpha, sigma), (alpha_needed, sigma_needed) = ends
        needed = f"{sigma_needed / alpha_needed:g}" if alpha_needed else "infinity"
        raise UserError(
            f"a schedule whose sigma / alpha ends at {sigma / alpha:g} has no model of the levels up to "
            f"{needed}; end the other schedule where this one does"
        )
