"""Samplers: plain functions of a denoiser, the same ones for teacher targets, students and evaluation.

Each takes a state x from times[0] down to times[-1]. times: (K + 1, B) float64, one column per image, or
K + 1 numbers for the whole batch: the coefficients are then numbers too, and a step is arithmetic alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from diffkd.core.denoiser import Denoiser
from diffkd.core.precision import HALF
from diffkd.core.schedules import Schedule, Time, read_prediction
from diffkd.errors import UserError

SamplerName = Literal["ddim", "heun", "dpmpp_2m", "ancestral", "renoise"]
Generators = torch.Generator | Sequence[torch.Generator]
Times = Tensor | Sequence[float]
Clip = float | None  # bound on x0
Noise = Callable[[Tensor], Tensor]  # fresh noise for a state


class Sampler(Protocol):
    def __call__(
        self, denoiser: Denoiser, x: Tensor, times: Times, *, clip: Clip, noise: Noise | None, **cond: Any
    ) -> Tensor: ...


def grid(steps: int) -> list[float]:
    """The steps + 1 times 1, (N - 1)/N, ..., 0."""
    return [i / steps for i in range(steps, -1, -1)]


def randn(shape: Sequence[int], generator: Generators | None, like: Tensor) -> Tensor:
    """Standard normal noise in the dtype of `like`: from one generator, or image i from generator i.

    Drawn on the generator's own device, then moved, as in stock pipelines.
    """
    if generator is None or isinstance(generator, torch.Generator):
        source = like.device if generator is None else generator.device
        return torch.randn(*shape, generator=generator, device=source, dtype=like.dtype).to(like.device)
    images = [torch.randn(1, *shape[1:], generator=g, device=g.device, dtype=like.dtype) for g in generator]
    return torch.cat(images).to(like.device)


def ddim_step(schedule: Schedule, x_t: Tensor, denoised: Tensor, t: Time, s: Time) -> Tensor:
    """Deterministic step from time t to an earlier s (Song et al. 2021, equation 12 with eta = 0).

    x_t, denoised: (B, ...). t, s: (B,) or numbers, s < t. Returns x_s: (B, ...).
    """
    alpha_t, sigma_t = schedule.at(t, like=x_t)
    alpha_s, sigma_s = schedule.at(s, like=x_t)
    ratio = sigma_s / sigma_t
    result: Tensor = ratio * x_t + (alpha_s - ratio * alpha_t) * denoised
    return result


def ddim(
    denoiser: Denoiser, x: Tensor, times: Times, *, clip: Clip = None, noise: Noise | None = None, **cond: Any
) -> Tensor:
    """DDIM (Song et al. 2021, equation 12, eta = 0), order 1, one evaluation a step.

    A float32 network is stepped by the stock scheduler's operations in their order, so that its pixels are
    the same bit for bit: on the straight path of a flow, Euler's step along its output. Elsewhere, in half
    precision, where that is meaningless, a step is two fused operations.
    """
    if denoiser.schedule.straight and denoiser.prediction == "flow" and clip is None:
        return _euler(denoiser, x, times, **cond)
    if isinstance(times, Tensor) or denoiser.dtype not in HALF or clip is not None:
        return ancestral(denoiser, x, times, clip=clip, noise=noise, eta=0.0, **cond)
    for t, s in pairwise(times):
        of_x, of_output = ddim_coefficients(denoiser, t, s)
        x = torch.add(of_x * x, denoiser.output(x, t, **cond), alpha=of_output)
    return x


def _euler(denoiser: Denoiser, x: Tensor, times: Times, **cond: Any) -> Tensor:
    for t, s in pairwise(times):
        (_, sigma_t), (_, sigma_s) = (denoiser.schedule.at(time, like=x) for time in (t, s))
        x = x + (sigma_s - sigma_t) * denoiser.output(x, t, **cond).to(x.dtype)
    return x


def ddim_coefficients(denoiser: Denoiser, t: float, s: float) -> tuple[float, float]:
    """(a, b) of a DDIM step as x_s = a x_t + b output, the network's own output of any prediction type."""
    alpha_t, sigma_t = denoiser.schedule.numbers(t)
    alpha_s, sigma_s = denoiser.schedule.numbers(s)
    x0_of_x, eps_of_x = read_prediction(denoiser.prediction, 1.0, 0.0, alpha_t, sigma_t)
    x0_of_output, eps_of_output = read_prediction(denoiser.prediction, 0.0, 1.0, alpha_t, sigma_t)
    return alpha_s * x0_of_x + sigma_s * eps_of_x, alpha_s * x0_of_output + sigma_s * eps_of_output


def ancestral(
    denoiser: Denoiser,
    x: Tensor,
    times: Times,
    *,
    clip: Clip = None,
    noise: Noise | None = None,
    eta: float = 1.0,
    **cond: Any,
) -> Tensor:
    """Stochastic DDIM (Song et al. 2021, equations 12 and 16): eta = 1 is DDPM's ancestral sampler.

    The direction is the network's own eps, not one derived from a clipped x0: the stock scheduler's step.
    """
    for t, s in pairwise(times):
        x0, eps = denoiser.predict(x, t, **cond)
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        alpha_s, sigma_s = denoiser.schedule.at(s, like=x)
        if eta == 0:
            x = alpha_s * x0 + sigma_s * eps
            continue
        alpha_t, sigma_t = denoiser.schedule.at(t, like=x)
        variance = denoiser.schedule.posterior_variance(alpha_t, sigma_t, alpha_s, sigma_s) * eta**2
        fresh = noise(x) if noise is not None else torch.randn_like(x)
        x = alpha_s * x0 + _root(sigma_s**2 - variance) * eps + _root(variance) * fresh
    return x


def renoise(
    denoiser: Denoiser, x: Tensor, times: Times, *, clip: Clip = None, noise: Noise | None = None, **cond: Any
) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): predict x0, then noise it afresh to s.

    What the stock LCMScheduler does, one evaluation a step, without noise in the last step to s = 0.
    """
    for t, s in pairwise(times):
        x0 = _clipped(denoiser(x, t, **cond), clip)
        if isinstance(s, float) and s == 0:
            return x0
        alpha_s, sigma_s = denoiser.schedule.at(s, like=x)
        fresh = noise(x) if noise is not None else torch.randn_like(x)
        x = alpha_s * x0 + sigma_s * fresh
    return x


def _root(value: Any) -> Any:
    """The square root, of 0 where rounding made the number negative."""
    return value.clamp(min=0).sqrt() if isinstance(value, Tensor) else math.sqrt(max(value, 0.0))


def heun(
    denoiser: Denoiser, x: Tensor, times: Times, *, clip: Clip = None, noise: Noise | None = None, **cond: Any
) -> Tensor:
    """Heun's method on d(x/sigma) / d(alpha/sigma) = denoised(x), order 2, two evaluations a step.

    The trapezoid of Karras et al. 2022 (algorithm 1) in the coordinate where the probability-flow ODE's right
    side is the denoised image itself: nothing divides by alpha, so it starts from zero terminal SNR, and a
    step is a DDIM step towards a mean of two predictions. At s = 0, where there is no second evaluation, it
    is Euler.
    """
    for t, s in pairwise(times):
        denoised = _clipped(denoiser(x, t, **cond), clip)
        if isinstance(s, float):
            if s > 0:
                ahead = ddim_step(denoiser.schedule, x, denoised, t, s)
                denoised = (denoised + _clipped(denoiser(ahead, s, **cond), clip)) / 2
        elif bool((s > 0).any()):
            ahead = ddim_step(denoiser.schedule, x, denoised, t, s)
            inside = (s > 0).reshape(-1, *[1] * (x.ndim - 1))
            second = _clipped(denoiser(ahead, torch.where(s > 0, s, t), **cond), clip)
            denoised = torch.where(inside, (denoised + second) / 2, denoised)
        x = ddim_step(denoiser.schedule, x, denoised, t, s)
    return x


def dpmpp_2m(
    denoiser: Denoiser, x: Tensor, times: Times, *, clip: Clip = None, noise: Noise | None = None, **cond: Any
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), order 2, one evaluation a step.

    A step is a DDIM step towards an x0 extrapolated in the half log-SNR lambda from the last two predictions.
    The first step, and one that ends at s = 0 (lambda infinite), are of first order.
    """
    previous = None
    slopes = _slopes(denoiser.schedule, times, x)
    for k, (t, s) in enumerate(pairwise(times)):
        denoised = _clipped(denoiser(x, t, **cond), clip)
        towards = denoised if previous is None else denoised + slopes[k] * (denoised - previous)
        x = ddim_step(denoiser.schedule, x, towards, t, s)
        previous = denoised
    return x


def _slopes(schedule: Schedule, times: Times, x: Tensor) -> list[Any]:
    """Extrapolation factors of every step but the first: h / (2 h_last) in lambda, 0 where h is infinite."""
    if isinstance(times, Tensor):
        h = schedule.half_log_snr(times).diff(dim=0)
        slopes = torch.where(h[1:].isfinite(), h[1:] / (2 * h[:-1]), 0.0).to(x.dtype)
        return [None, *slopes.reshape(*slopes.shape, *[1] * (x.ndim - 1))]
    lambdas = [_half_log_snr(*schedule.numbers(t)) for t in times]
    steps = [after - before for before, after in pairwise(lambdas)]
    return [None, *(h / (2 * h_last) if h < math.inf else 0.0 for h_last, h in pairwise(steps))]


def _half_log_snr(alpha: float, sigma: float) -> float:
    return math.log(alpha / sigma) if alpha and sigma else math.copysign(math.inf, alpha - sigma)


def _clipped(x0: Tensor, clip: Clip) -> Tensor:
    return x0 if clip is None else x0.clamp(-clip, clip)


SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim, "heun": heun, "dpmpp_2m": dpmpp_2m, "ancestral": ancestral, "renoise": renoise,
}  # fmt: skip


def find(name: str) -> Sampler:
    """Raises UserError for an unknown name."""
    if name not in SAMPLERS:
        raise UserError(f"sampler {name!r} is unknown; use one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def nfe(sampler: str, steps: int) -> int:
    """Network evaluations of a run down to t = 0, without guidance."""
    return len(times_asked(sampler, steps))


def times_asked(sampler: str, steps: int) -> list[float]:
    """The times of these evaluations, in their order."""
    times = grid(steps)[:-1]
    return times if sampler != "heun" else [*times[:1], *(t for t in times[1:] for _ in range(2))]


def fresh_noises(sampler: str, steps: int, eta: float = 1.0) -> int:
    """How many times a run draws noise after its first state."""
    if sampler == "renoise":
        return steps - 1
    return steps if sampler == "ancestral" and eta != 0 else 0


def sample(
    denoiser: Denoiser,
    noise: Tensor,
    steps: int,
    sampler: str = "ddim",
    *,
    generator: Generators | None = None,
    fresh: Noise | None = None,
    **cond: Any,
) -> Tensor:
    """Images from noise: (B, C, H, W) -> x0 (B, C, H, W), in the dtype of `noise`, on an even grid of times.

    generator: for the noise of a stochastic sampler, one or one per image; or fresh: a function of a state
    that gives it. cond: class_labels (B,), guidance, eta. The denoiser's own `clip` bounds x0 at every step.
    """
    if steps < 1:
        raise UserError(f"steps {steps} is not a number of denoising steps; use 1 or more")

    def from_generator(x: Tensor) -> Tensor:
        return randn(x.shape, generator, x)

    source = from_generator if fresh is None else fresh
    first = denoiser.schedule.from_noise(noise)
    return find(sampler)(denoiser, first, grid(steps), clip=denoiser.clip, noise=source, **cond)
