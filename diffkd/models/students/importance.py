"""Importance of a network's channels: a score for every row of every parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from diffkd.core.denoiser import Denoiser
from diffkd.core.losses import squared_error, weight_at
from diffkd.core.noise import add_noise, grid_times
from diffkd.models.students.copies import copy_of

Batch = tuple[Tensor, Mapping[str, Tensor]]  # x0 and conditioning
Scores = Mapping[str, Tensor]  # of every parameter by name, (rows,) float64


def norm_scores(network: nn.Module) -> dict[str, Tensor]:
    """Squared norm of each row of every parameter (Li et al. 2017, section 3.1, with the 2-norm); zeros for a
    network on the meta device, which has no weights."""
    return {
        name: torch.zeros(len(p), dtype=torch.float64)
        if p.is_meta
        else p.detach().double().cpu().reshape(len(p), -1).square().sum(1)
        for name, p in network.named_parameters()
    }


def taylor_scores(teacher: Denoiser, batches: Iterable[Batch], rng: torch.Generator) -> dict[str, Tensor]:
    """Importance for the teacher's denoising loss, summed over batches (Molchanov et al. 2019).

    rng: draws the times and the noise.
    """
    probe = copy_of(teacher).requires_grad_(True)
    total: dict[str, Tensor] = {}
    for x0, cond in batches:
        x0 = x0.to(probe.device)
        t, _ = grid_times(len(x0), probe.schedule.num_train_timesteps, rng, probe.device)
        x_t = add_noise(probe.schedule, x0, t, rng)
        denoised = probe(x_t, t, **{key: value.to(probe.device) for key, value in cond.items()})
        w = weight_at(probe.weighting, probe.schedule, t)
        (w * squared_error(denoised, x0)).mean().backward()
        for name, score in _gradient_scores(probe.network).items():
            total[name] = total[name] + score if name in total else score
        probe.zero_grad()
    return total


def _gradient_scores(network: nn.Module) -> dict[str, Tensor]:
    """(sum of w dL/dw)^2 over each row, from the gradients held: the change of the loss without the row, to
    first order."""
    scores = {}
    for name, p in network.named_parameters():
        product = torch.zeros_like(p) if p.grad is None else p.detach() * p.grad
        scores[name] = product.double().cpu().reshape(len(p), -1).sum(1).square()
    return scores
