"""What follows a student: a fake network that denoises its images, and heads that tell them from the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from diffkd.core.denoiser import Denoiser
from diffkd.core.discriminator import Heads, accuracy, finite_r1, logistic, nudged, seen
from diffkd.core.noise import add_noise
from diffkd.core.scores import denoising_error, noise_times

Following = tuple[str, Tensor, dict[str, Tensor]]  # the network that learns, its loss, metrics, each (B,)


def fake_losses(
    fake: Denoiser,
    heads: Heads | None,
    x: Tensor,
    images: Callable[[], Tensor],
    data: Tensor,
    updates: int,
    rng: torch.Generator,
    *,
    gan: float = 0.0,
    r1: float = 0.0,
    r1_noise: float = 0.1,
    **cond: Any,
) -> Iterator[Following]:
    """The losses of the fake network, and of a discriminator's heads on its blocks, for one of the student.

    x: the student's images, (B, C, H, W), which the first update learns; images: draws others, for the rest.
    data: real images, (B, C, H, W), which the heads tell from these at the same noise levels; without heads
    they are not read. gan: weight of the discriminator's loss in the fake network's, whose features learn to
    tell them apart too (Yin et al. 2024, section 4.3). r1, r1_noise: weight of `finite_r1` in the heads'
    loss, and the deviation of its noise. Each loss is computed after the network of the one before was
    updated.
    """
    schedule = fake.schedule
    for k in range(updates):
        # 1. the fake network learns the student's images at every noise level
        if k:
            with torch.no_grad():
                x = images()
        x = x.detach()
        t = noise_times(len(x), schedule, 0.0, 1.0, rng, x.device)
        denoised, drawn = seen(fake, heads, add_noise(schedule, x, t, rng), t, learns=True, **cond)
        loss = error = denoising_error(fake, denoised, x, t)
        if heads is None:
            yield "fake", loss.mean(), {"t": t, "loss": error.detach()}
            continue
        # 2. and to tell them from the data
        x_t = add_noise(schedule, data, t, rng)
        with torch.set_grad_enabled(gan > 0):
            _, real = seen(fake, heads, x_t, t, **cond)
        if gan:
            loss = error + gan * logistic(heads(real), heads(drawn))
        features = [[feature.detach() for feature in found] for found in (real, drawn)]
        if r1:  # by the same network, which is about to learn
            with torch.no_grad():
                features.append(seen(fake, heads, nudged(schedule, x_t, t, r1_noise, rng), t, **cond)[1])
        yield "fake", loss.mean(), {"t": t, "loss": error.detach()}
        # 3. then the heads do, whose logits are to change little where the data does
        logits, told, *moved = map(heads, features)
        loss = logistic(logits, told)
        if r1:
            loss = loss + r1 * finite_r1(logits, *moved)
        yield "heads", loss.mean(), {"t": t, "accuracy": accuracy(logits, told)}
