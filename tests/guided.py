"""Teachers of classes in closed form, to be guided: each class, and no class, is N(its mean, std² I)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule, from_diffusers, write_prediction

COSINE, LINEAR = Schedule.cosine(64), from_diffusers(DDPMScheduler())
NULL = 3
MEANS = torch.tensor([-0.6, 0.1, 0.7, 0.2], dtype=torch.float64)  # of three classes and of no class
STD = 0.5


def posterior(schedule: Schedule, x_t: Tensor, t: Any, mean: Any, std: float = STD) -> Tensor:
    """E[x0 | x_t] of data from N(mean, std² I)."""
    alpha, sigma = schedule.at(t, like=x_t)
    return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)


class Classes(nn.Module):
    """The exact posterior mean of each class, and of no class, as any prediction type."""

    def __init__(self, schedule: Schedule, prediction: str, means: Tensor = MEANS, std: float = STD) -> None:
        super().__init__()
        self.schedule, self.prediction, self.std = schedule, prediction, std
        self.means = nn.Parameter(means.clone(), requires_grad=False)
        self.calls: list[int] = []  # sizes of their batches

    def forward(self, x_t: Tensor, time: Tensor, class_labels: Tensor) -> Tensor:
        self.calls.append(len(x_t))
        t = self.schedule.of_network_time(time)
        mean = self.means[class_labels].reshape(-1, 1, 1, 1)
        x0 = posterior(self.schedule, x_t, t, mean, self.std)
        return write_prediction(self.prediction, x_t, x0, *self.schedule.at(t, like=x_t))


def model(schedule: Schedule = COSINE, prediction: str = "v_prediction", **options: Any) -> Denoiser:
    """Of images of 2x2. options: means and std."""
    return Denoiser(
        Classes(schedule, prediction, **options), schedule, prediction, shape=(1, 2, 2), num_classes=3,
        null_label=NULL,
    )  # fmt: skip


def level(schedule: Schedule, t: float) -> float:
    """sigma / alpha."""
    alpha, sigma = schedule.numbers(t)
    return sigma / alpha if alpha else float("inf")


def by_hand(
    schedule: Schedule, x: Tensor, t: Any, labels: Tensor, w: Any, null: Tensor | None = None
) -> Tensor:
    """Guided x0. null: in place of what the data of no class has."""
    given = posterior(schedule, x, t, MEANS[labels].reshape(-1, 1, 1, 1))
    null = posterior(schedule, x, t, MEANS[NULL]) if null is None else null
    return null + w * (given - null)
