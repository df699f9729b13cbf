"""Students of the Gaussian teacher in closed form, and small ones that learn, for methods whose exact student
maps a state to the start of its trajectory (`gaussian.flow` to 0)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule, write_prediction
from diffkd.methods.base import Batch, Method, Stage, Step
from tests.gaussian import flow


class Exact(nn.Module):
    """f(x_t, t) = where the trajectory begins, as any prediction type; a and b move it from there."""

    def __init__(self, schedule: Schedule, prediction: str, a: float = 0.0, b: float = 0.0) -> None:
        super().__init__()
        self.schedule, self.prediction = schedule, prediction
        self.a, self.b = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (a, b))

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        t = (time.double() + 1) / self.schedule.num_train_timesteps
        alpha, sigma = self.schedule.at(t, like=x_t)
        x0 = flow(self.schedule, x_t, t, torch.zeros_like(t))
        return write_prediction(self.prediction, x_t, x0, alpha, sigma) + self.a * x_t + self.b


def exact(schedule: Schedule, prediction: str = "v_prediction", a: float = 0.0, b: float = 0.0) -> Denoiser:
    return Denoiser(
        Exact(schedule, prediction, a, b), schedule, prediction, shape=(1, 4, 4), sampler="renoise"
    )


class Family(nn.Module):
    """v of the exact student for data of a mean and width that are learned, at first 0 and 1."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.mean, self.std = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (0.0, 1.0))

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        t = (time.double() + 1) / self.schedule.num_train_timesteps
        alpha, sigma = self.schedule.at(t, like=x_t)
        width = (alpha**2 * self.std**2 + sigma**2).sqrt()
        x0 = self.mean + self.std / width * (x_t - alpha * self.mean)
        return write_prediction("v_prediction", x_t, x0, alpha, sigma)


def family(schedule: Schedule) -> Denoiser:
    return Denoiser(Family(schedule), schedule, "v_prediction", shape=(1, 2, 2), sampler="renoise")


def data(
    count: int, generator: torch.Generator, size: int = 4, mean: float = 0.3, std: float = 0.5
) -> Tensor:
    return mean + std * torch.randn(count, 1, size, size, generator=generator, dtype=torch.float64)


def gradients(
    method: Method, nets: dict[str, Denoiser], stage: Stage, update: int, count: int, seed: int = 0
) -> Tensor:
    """Of the student's loss on `count` fresh images, with respect to a and b of an `exact` one: (2,)."""
    rng = torch.Generator().manual_seed(seed)
    loss = next(method.losses(nets, Batch(data(count, rng), {}), Step(stage, update), rng))
    network = nets["student"].network
    return torch.stack(torch.autograd.grad(loss.value, [network.a, network.b]))


def train(method: Method, nets: dict[str, nn.Module], stage: Stage, batch: int = 64) -> None:
    """Every update of the stage by Adam, on fresh images."""
    learns = {name: list(net.parameters()) for name, net in nets.items() if name in ("student", "weight")}
    optimizers = {name: torch.optim.Adam(params, 1e-3) for name, params in learns.items()}
    for update in range(stage.updates):
        rng = torch.Generator().manual_seed(update)
        for loss in method.losses(nets, Batch(data(batch, rng, 2), {}), Step(stage, update), rng):
            optimizer = optimizers[loss.network]
            optimizer.param_groups[0]["lr"] = stage.rate(update)
            grads = torch.autograd.grad(loss.value, learns[loss.network])
            for parameter, grad in zip(learns[loss.network], grads, strict=True):
                parameter.grad = grad
            optimizer.step()
        method.after_update(nets, Step(stage, update))


def at_noise(schedule: Schedule, log_kappa: Tensor) -> Tensor:
    """The t of log(sigma / alpha), by bisection: (B,) -> float64 (B,)."""
    low, high = torch.zeros_like(log_kappa), torch.ones_like(log_kappa)
    for _ in range(60):
        middle = (low + high) / 2
        below = -schedule.half_log_snr(middle) < log_kappa
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high
