"""Distribution matching on Gaussians: networks in closed form, and what a method makes of its student."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule
from diffkd.methods.base import Batch, Loss, Method, Step
from tests.gaussian import Fitted, affine

COSINE = Schedule.cosine(64)
TEACHER, STUDENT, FAKE = (0.3, 0.5), (-0.2, 0.8), (-0.1, 0.7)  # mean and std


class BestHeads(nn.Module):
    """The best discriminator: log p / q of noised images of two networks that have a mean and a std."""

    def __init__(self, real: Any, drawn: Any) -> None:
        super().__init__()
        self.blocks = ["state"]
        self.of = (real, drawn)  # a tuple: they are no parts of it

    def forward(self, features: list[Tensor]) -> Tensor:
        (x_t, time) = features[0].chunk(2, 1)
        log_p, log_q = (self.log_density(x_t, time[:, 0, 0, 0], network) for network in self.of)
        return (log_p - log_q)[:, None]

    def log_density(self, x_t: Tensor, time: Tensor, network: Any) -> Tensor:
        alpha, sigma = COSINE.at((time + 1) / len(COSINE.alphas_cumprod), like=x_t)
        mean, std = (getattr(network, name).detach() for name in ("mean", "std"))
        density = Normal(alpha * mean, (alpha**2 * std**2 + sigma**2).sqrt())
        return density.log_prob(x_t).flatten(1).sum(1)


def nets_of(student: tuple[float, float] = STUDENT, fake: tuple[float, float] = FAKE) -> dict[str, Any]:
    """Teacher, student and fake network, in float64."""
    teacher, own = (
        Denoiser(Fitted(COSINE, *which), COSINE, "sample", shape=(1, 4, 4)) for which in (TEACHER, fake)
    )
    return {"teacher": teacher.requires_grad_(False), "student": affine(COSINE, *student), "fake": own}


def batch_of(count: int = 3, seed: int = 7) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 1, 4, 4, generator=rng, dtype=torch.float64)
    return Batch(TEACHER[0] + TEACHER[1] * noise, {})


def losses_of(method: Method, nets: dict[str, Any], seed: int = 5, count: int = 3) -> list[Loss]:
    """The losses of one update, without any being made smaller."""
    rng = torch.Generator().manual_seed(seed)
    step = Step(method.stages(nets["student"])[0], 0)
    return list(method.losses(nets, batch_of(count), step, rng))


def student_gradient(loss: Loss, nets: dict[str, Any]) -> Tensor:
    """In the student's mean and std."""
    network = nets["student"].network
    return torch.stack(torch.autograd.grad(loss.value, (network.mean, network.std)))


def posterior(x_t: Tensor, t: Tensor, which: tuple[float, float]) -> Tensor:
    """E[x0 | x_t] of N(mean, std²), by Bayes' rule for two precisions."""
    alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in COSINE.at(t))
    mean, std = which
    precision = 1 / std**2 + alpha**2 / sigma**2
    return (mean / std**2 + alpha * x_t / sigma**2) / precision


def noised(x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in COSINE.at(t))
    return alpha * x + sigma * eps


class Draws:
    """The random numbers of one update, in the order in which a method draws them."""

    def __init__(self, seed: int = 5, count: int = 3) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        self.shape = (count, 1, 4, 4)

    def student_noise(self) -> Tensor:
        z = torch.randn(self.shape, generator=self.rng, dtype=torch.float64)
        torch.rand((), generator=self.rng, dtype=torch.float64)  # where the shares of the steps begin
        return z

    def times(self, first: int, last: int) -> Tensor:
        return torch.randint(first, last + 1, self.shape[:1], generator=self.rng).double() / 64

    def noise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(self.shape, generator=self.rng, dtype=dtype)


def train(
    method: Method,
    nets: dict[str, Any],
    updates: int = 100,
    rate: float = 0.03,
    before: Callable[[dict[str, Any]], None] = lambda nets: None,
) -> tuple[float, float]:
    """Trains what has parameters, by Adam with a rate that falls to zero; the student's mean and std."""
    stage = method.stages(nets["student"])[0]
    learners = {
        name: torch.optim.Adam(net.parameters(), betas=(0.5, 0.99))
        for name, net in nets.items()
        if name != "teacher" and any(True for _ in net.parameters())
    }
    for update in range(updates):
        for optimizer in learners.values():
            optimizer.param_groups[0]["lr"] = rate * (1 - update / updates)
        before(nets)
        rng = torch.Generator().manual_seed(update)
        for loss in method.losses(nets, batch_of(128, update), Step(stage, 0), rng):
            if loss.network in learners:
                params = list(nets[loss.network].parameters())
                grads = torch.autograd.grad(loss.value, params)
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad
                learners[loss.network].step()
    network = nets["student"].network
    return network.mean.item(), abs(network.std.item())
