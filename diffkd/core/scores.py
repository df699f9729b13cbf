"""Distribution matching: a student's images, noised, between its teacher and a network that learned them.

This fake network is a denoiser of the student's images, as the teacher is one of the data. What the two
predict of the same noised image x_t differs, up to a factor, as their scores do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from diffkd.core import samplers
from diffkd.core.denoiser import Denoiser, StockSampler
from diffkd.core.losses import squared_error, weight
from diffkd.core.noise import grid_times
from diffkd.core.schedules import Schedule
from diffkd.io.prefetch import to_device

Divergence = Literal[
    "reverse_kl", "forward_kl", "jensen_shannon", "softened_reverse_kl", "squared_hellinger", "jeffreys"
]
# h(r) = r² f''(r) of the f-divergence E_q f(p / q) (Xu et al. 2025, table 1; factors aside)
WEIGHTS: dict[Divergence, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "forward_kl": lambda r: r,
    "jensen_shannon": lambda r: r / (1 + r),
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "squared_hellinger": torch.sqrt,
    "jeffreys": lambda r: 1 + r,
}


# what the student is given, and at which noise its images are compared


def check_start(start: Denoiser, steps: int, guidance: float, drawn: StockSampler = "renoise") -> None:
    """Raises UserError for a model of which no student can be made that draws from noise by its x0."""
    start.schedule.check_steps(steps, drawn)
    if guidance != 1.0:
        start.check_guidance()
    start.check_from_noise()


def check_drawn(drawn: StockSampler, simulate: bool) -> None:
    """Raises ValueError for later steps that start from noised data where the student is drawn by ddim."""
    if drawn == "ddim" and not simulate:
        raise ValueError(
            "simulate: false starts later steps from noised data, and those of a student drawn by ddim start "
            "from its own; leave one of the two out"
        )


@torch.no_grad()
def student_inputs(
    student: Denoiser, x0: Tensor, steps: int, rng: torch.Generator, *, simulated: bool, **cond: Tensor
) -> tuple[Tensor, Tensor]:
    """x_t (B, C, H, W) and t (B,) of the grid i / steps, which a student drawn by renoise is trained at.

    x0: images (B, C, H, W), of which `simulated` takes only the shape, dtype and device. simulated: inputs
    are those of the student's own sampling (backward simulation, Yin et al. 2024, section 4.5), an equal
    share of the rows at each time, in order; else noised images at random times. At t = 1 they are noise.
    """
    if not simulated:
        t, _ = grid_times(len(x0), steps, rng, x0.device)
        eps = _noise_like(x0, rng)
        alpha, sigma = student.schedule.at(t, like=x0)
        first = student.schedule.from_noise(eps)
        return torch.where((t == 1).reshape(-1, 1, 1, 1), first, alpha * x0 + sigma * eps), t
    x = student.schedule.from_noise(_noise_like(x0, rng))
    shift = torch.rand((), generator=rng, dtype=torch.float64)
    count = len(x)
    taken = ((torch.arange(count) + shift) * steps / count).long().clamp(max=steps - 1)  # steps, by row
    for k in range(steps - 1):
        going = max(int((taken > k).sum()), 1)  # at least one: all processes call a sharded network together
        rows = {key: value[-going:] for key, value in cond.items()}
        denoised = student(x[-going:], 1 - k / steps, **rows)
        alpha, sigma = student.schedule.at(1 - (k + 1) / steps, like=x)
        noised = alpha * denoised + sigma * _noise_like(denoised, rng)
        if taken[-1] > k:
            x = torch.cat([x[:-going], noised])
    return x, to_device((steps - taken).double() / steps, x.device)


def draw(
    student: Denoiser,
    x0: Tensor,
    steps: int,
    rng: torch.Generator,
    *,
    drawn: StockSampler = "renoise",
    simulated: bool = True,
    **cond: Any,
) -> Tensor:
    """The student's images, (B, C, H, W), as many as x0.

    By renoise, which samples anew from what every step gives, they are what one step makes of its inputs (see
    `student_inputs`), and gradients pass through this step. By ddim only the last step gives an image, and
    gradients pass through all of them.
    """
    if drawn == "ddim":
        first = student.schedule.from_noise(_noise_like(x0, rng))
        return samplers.ddim(student, first, samplers.grid(steps), **cond)
    x_t, t = student_inputs(student, x0, steps, rng, simulated=simulated, **cond)
    x: Tensor = student(x_t, t, **cond)
    return x


def noise_times(
    count: int, schedule: Schedule, low: float, high: float, rng: torch.Generator, device: torch.device
) -> Tensor:
    """Random t of the schedule's table, from low to high: (B,) float64."""
    total = schedule.num_train_timesteps
    first = min(max(math.ceil(low * total - 1e-6), 1), total)
    last = max(math.floor(high * total + 1e-6), first)
    i = torch.randint(first, last + 1, (count,), generator=rng)
    return to_device(i, device).double() / total


def _noise_like(x: Tensor, rng: torch.Generator) -> Tensor:
    return to_device(torch.randn(x.shape, generator=rng, dtype=x.dtype), x.device)


# losses, each (B,)


def denoising_error(denoiser: Denoiser, denoised: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """The squared error of a prediction of x0, (B, C, H, W), as one of what its network outputs."""
    schedule = denoiser.schedule
    of_output = weight(denoiser.weighting, schedule.snr(t), width=schedule.width)
    return of_output.to(denoised.dtype) * squared_error(denoised, x0)


def error_size(x: Tensor, denoised: Tensor) -> Tensor:
    """Mean |x - denoised| of each example, (B, 1, 1, 1): how far a prediction is from what was noised.

    Differences of predictions in units of it weigh about the same at every noise level (Yin et al. 2024).
    """
    return (x - denoised).detach().abs().flatten(1).mean(1).clamp(min=1e-5).reshape(-1, 1, 1, 1)


def descent(x: Tensor, direction: Tensor) -> Tensor:
    """A loss whose gradient in x is this direction over the number of values; half its mean square.

    x: the student's images, (B, C, H, W); they are to move against the direction, which has no gradient.
    """
    return squared_error(x - x.detach(), -direction.detach()) / 2


def score_identity(x: Tensor, real: Tensor, fake: Tensor, alpha: float, size: Tensor) -> Tensor:
    """((1 - alpha) delta² + delta (fake - x)) / size, delta = real - fake: the loss of Zhou et al. 2024.

    x: the student's images; real, fake: the predictions at x noised, through which gradients pass. With a
    constant size and alpha = 1/2, its expected gradient is half that of E delta² for a fake network that
    follows the student, though no derivative of its following is taken.
    """
    delta = real - fake
    terms = (1 - alpha) * delta.square() + delta * (fake - x)
    return (terms / size).flatten(1).mean(1)


# weights of f-divergences


def divergence_weight(name: Divergence, ratio: Tensor) -> Tensor:
    """h(r) of the ratio r of the teacher's density to the student's, shaped like it.

    The gradient of the divergence is that of the reverse KL with h(r) as the weight of every example (Xu et
    al. 2025).
    """
    return WEIGHTS[name](ratio)


def density_ratio(logits: Tensor, t: Tensor, bins: int, low: float, high: float) -> Tensor:
    """The teacher's density over the student's at the student's noised images: (B, K), (B,) -> (B,).

    logits: of a discriminator, log(p / q) where it is optimal; averaged over its K heads. Cut at low and
    high, and divided by its mean in equal bins of t, since the ratio's mean over the student's images is 1.
    """
    ratio = logits.detach().mean(1).exp().clamp(low, high)
    bin_of = (t * bins).ceil().long().clamp(1, bins) - 1
    inside = (bin_of[:, None] == torch.arange(bins, device=t.device)).to(ratio.dtype)
    means = (ratio @ inside) / inside.sum(0).clamp(min=1)
    return ratio / means[bin_of]
