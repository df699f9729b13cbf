"""Teachers in closed form: data from N(mean, diag(std²)), of one mean and std or of one for every pixel."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from diffkd.core import flow as flows
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule, write_prediction

Of = float | Tensor  # a mean or a std: of all pixels, or (1, C, H, W)


class Gaussian(nn.Module):
    """The exact posterior mean E[x0 | x_t], as any prediction type. Its time is a table index."""

    def __init__(self, schedule: Schedule, prediction: str, mean: Of = 0.3, std: Of = 0.5) -> None:
        super().__init__()
        self.schedule, self.prediction, self.mean, self.std = schedule, prediction, mean, std
        self.calls = 0

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        self.calls += 1
        t = self.schedule.of_network_time(time)
        alpha, sigma = self.schedule.at(t, like=x_t)
        x0 = self.mean + alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2) * (x_t - alpha * self.mean)
        return write_prediction(self.prediction, x_t, x0, alpha, sigma)


def gaussian(schedule: Schedule, prediction: str = "sample", mean: Of = 0.3, std: Of = 0.5) -> Denoiser:
    return Denoiser(Gaussian(schedule, prediction, mean, std), schedule, prediction, shape=(1, 4, 4))


def flow(schedule: Schedule, x_t: Tensor, t: Tensor, s: Tensor, mean: Of = 0.3, std: Of = 0.5) -> Tensor:
    """Where the probability-flow ODE carries x_t from t to s, exactly: in units of its width it stays."""
    alpha_t, sigma_t = schedule.at(t, like=x_t)
    alpha_s, sigma_s = schedule.at(s, like=x_t)
    width_t = (alpha_t**2 * std**2 + sigma_t**2).sqrt()
    width_s = (alpha_s**2 * std**2 + sigma_s**2).sqrt()
    return alpha_s * mean + width_s / width_t * (x_t - alpha_t * mean)


class Affine(nn.Module):
    """A generator: mean + std * noise, whatever the time. Both are parameters."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.std = nn.Parameter(torch.tensor(std, dtype=torch.float64))

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        return self.mean + self.std * x_t


def affine(schedule: Schedule, mean: float = -0.2, std: float = 0.8) -> Denoiser:
    """A student whose one step from noise draws N(mean, std² I)."""
    return Denoiser(Affine(mean, std), schedule, "sample", shape=(1, 4, 4))


class Fitted(Gaussian):
    """A posterior mean whose mean and std are learnt: a fake network of Gaussian images."""

    def __init__(self, schedule: Schedule, mean: float = 0.3, std: float = 0.5) -> None:
        super().__init__(schedule, "sample", mean, std)
        del self.mean, self.std
        self.mean, self.std = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (mean, std))
        self.state = State()

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        self.state(x_t, time)
        return super().forward(x_t, time, **cond)


class State(nn.Module):
    """What it is called with, as a feature map: for discriminators in closed form."""

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        return torch.cat([x_t, time.to(x_t.dtype).reshape(-1, 1, 1, 1).expand_as(x_t)], 1)


def marginal(schedule: Schedule, t: float, mean: Any, std: Any) -> Normal:
    """The distribution of one value of x_t."""
    alpha, sigma = schedule.numbers(t)
    return Normal(alpha * mean, (alpha**2 * std**2 + sigma**2) ** 0.5)


class FlowMap(nn.Module):
    """The average velocity of `flow` over a step, exactly, for a student that is given its length.

    off: added to it, for students that are not exact. A step of length 0 is not defined.
    """

    def __init__(self, schedule: Schedule, off: float = 0.0, mean: Of = 0.3, std: Of = 0.5) -> None:
        super().__init__()
        self.schedule, self.off, self.mean, self.std = schedule, off, mean, std

    def forward(self, x_t: Tensor, time: Tensor, interval: Tensor, **cond: Tensor) -> Tensor:
        t = self.schedule.of_network_time(time)
        s = t - interval
        s = s * (s > 1e-6)  # the time is rounded to float32 on its way here
        x_s = flow(self.schedule, x_t, t, s, self.mean, self.std)
        z_t, z_s = (x / flows.scale(self.schedule, time, x_t) for x, time in ((x_t, t), (x_s, s)))
        length = flows.flow_time(self.schedule, t) - flows.flow_time(self.schedule, s)
        return (z_t - z_s) / length.to(x_t).reshape(-1, *[1] * (x_t.ndim - 1)) + self.off


def flow_map(schedule: Schedule, off: float = 0.0) -> Denoiser:
    return Denoiser(FlowMap(schedule, off), schedule, "flow", shape=(1, 4, 4))


class Linear(nn.Module):
    """u = a x + b, with a and b sums of the flow's own, of 1 and of the step's length: the weights learn."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.exact = FlowMap(schedule)
        self.weights = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))

    def forward(self, x_t: Tensor, time: Tensor, interval: Tensor, **cond: Tensor) -> Tensor:
        shape = (len(x_t), 1, 1, 1)
        length = interval.clamp(min=1e-3)  # the flow's own velocity is that of a short step
        zero = self.exact(x_t.new_zeros(shape), time, length)
        slope = self.exact(x_t.new_ones(shape), time, length) - zero
        a, b = (
            w[0] * known + w[1] + w[2] * interval.reshape(shape)
            for w, known in zip(self.weights, (slope, zero), strict=True)
        )
        return a * x_t + b


def linear(schedule: Schedule) -> Denoiser:
    """A student that can become the flow's average velocity, and begins as 0."""
    return Denoiser(Linear(schedule), schedule, "flow", shape=(1, 4, 4))
