"""How a small feature network learns from images: by their classes, or by telling views of them apart.

Everything random comes from one generator on the CPU: the same seed gives the same network on one machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.core.precision import full_float32
from diffkd.metrics.features.trained import TrainedNetwork

BATCH, RATE, DECAY = 128, 3e-3, 0.05
WARM_UP = 20  # one so-many-th of the updates
HELD_OUT = 5  # every so many images is one that is not learned from
SMOOTHING = 0.05  # of labels
EXPANDED = 256  # width of the views' embeddings
INVARIANCE, VARIANCE, COVARIANCE = 25.0, 25.0, 1.0  # weights of the paper
LEAST_DEVIATION = 1e-4  # of a feature; below it, it is constant
PART = 256  # images at a time without gradients


class Learned(NamedTuple):
    """network: on the CPU, its features of variance 1. The numbers are of the held-out images; accuracy and
    largest_class without labels None, same_image with them."""

    network: TrainedNetwork
    images: int
    held_out: int
    accuracy: float | None
    largest_class: float | None
    same_image: float | None
    effective_rank: float


def vicreg(a: Tensor, b: Tensor) -> Tensor:
    """Invariance, variance and covariance of two views' embeddings (B, d) (Bardes et al. 2022, equations 1 to
    6), with the weights and scales of the authors' code."""
    invariance = F.mse_loss(a, b)
    variance = covariance = a.new_zeros(())
    for z in (a, b):
        z = z - z.mean(0)
        variance = variance + F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
        c = z.T @ z / (len(z) - 1)
        covariance = covariance + (c.square().sum() - c.diagonal().square().sum()) / z.shape[1]
    return INVARIANCE * invariance + VARIANCE * variance / 2 + COVARIANCE * covariance


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the shares of variance along the principal axes of features (N, d): from 1, all
    along a line, to d (Roy & Vetterli 2007, of the covariance)."""
    x = features.double()
    values = torch.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0))).clamp(min=0)
    if not values.sum() > 0:
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


def view(x: Tensor, rng: torch.Generator, strength: float) -> Tensor:
    """Each image (B, C, S, S) moved, enlarged, made lighter or darker, and noisy, at random. strength: 1 for
    views of which the image alone is to be told, less where its class is."""

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(x), *shape, generator=rng)

    scale = 1 - strength * between(0, 0.4, 1)
    theta = torch.zeros(len(x), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale[:, 0]
    theta[:, :, 2] = between(-1, 1, 2) * torch.maximum(1 - scale, torch.tensor(0.1 * strength))
    grid = F.affine_grid(theta.to(x), list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    contrast = 1 + strength * between(-0.4, 0.4, 1, 1, 1)
    light = strength * between(-0.3, 0.3, 1, 1, 1)
    noise = torch.randn(x.shape, generator=rng) * (0.1 * strength * between(0, 1, 1, 1, 1))
    return moved * contrast.to(x) + light.to(x) + noise.to(x)


def learn(
    images: Tensor,
    labels: Tensor | None,
    *,
    num_classes: int,
    num_features: int,
    width: int,
    updates: int,
    seed: int,
    device: torch.device,
    on_update: Callable[[int], None],
) -> Learned:
    """Trains a network on images (N, C, S, S) uint8, by labels (N,) where they are given."""
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=rng)
    held_out, chosen = order[: len(order) // HELD_OUT], order[len(order) // HELD_OUT :]
    channels, size = images.shape[1:3]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TrainedNetwork(channels, size, width, num_features, 0 if labels is None else num_classes)
        expander = nn.Sequential(nn.SiLU(), nn.Linear(num_features, EXPANDED), nn.SiLU(),
                                 nn.Linear(EXPANDED, EXPANDED))  # fmt: skip
    both = nn.ModuleList([network, expander]).to(device)
    optimizer = torch.optim.AdamW(both.parameters(), lr=RATE, weight_decay=DECAY)
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, WARM_UP * (update + 1) / updates) * (1 - update / updates)
        rows = chosen[torch.randint(len(chosen), (BATCH,), generator=rng)]
        x = scaled(images[rows])
        if labels is None:
            a, b = (expander(network.raw(view(x, rng, 1).to(device))) for _ in range(2))
            loss = vicreg(a, b)
        else:
            logits = network.logits(network.raw(view(x, rng, 0.4).to(device)))
            loss = F.cross_entropy(logits, labels[rows].to(device), label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        on_update(1)
    network = network.cpu().requires_grad_(False)
    standardise(network, _raw(network, images[chosen]))
    return Learned(network, len(chosen), len(held_out), *_measured(network, images, labels, held_out, rng))


def scaled(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def standardise(network: TrainedNetwork, raw: Tensor) -> None:
    """Gives the features that the network made, (N, d), mean 0 and variance 1; one that is constant keeps its
    scale."""
    std, mean = torch.std_mean(raw.double(), 0)
    network.mean.copy_(mean)
    network.std.copy_(torch.where(std > LEAST_DEVIATION * std.max(), std, std.max().clamp(min=1e-30)))


def _raw(network: TrainedNetwork, images: Tensor) -> Tensor:
    with torch.no_grad(), full_float32("cpu"):
        return torch.cat([network.raw(scaled(part)) for part in images.split(PART)])


def _measured(
    network: TrainedNetwork, images: Tensor, labels: Tensor | None, held_out: Tensor, rng: torch.Generator
) -> tuple[float | None, float | None, float | None, float]:
    raw = _raw(network, images[held_out])
    rank = effective_rank((raw - network.mean) / network.std)
    if labels is not None:
        told, true = network.logits(raw).argmax(1), labels[held_out]
        return float((told == true).double().mean()), float(true.bincount().max() / len(true)), None, rank
    some = scaled(images[held_out[:PART]])
    one, two = ((network.raw(view(some, rng, 1)) - network.mean) / network.std for _ in range(2))
    nearest = torch.cdist(one, two).argmin(1)
    return None, None, float((nearest == torch.arange(len(some))).double().mean()), rank
