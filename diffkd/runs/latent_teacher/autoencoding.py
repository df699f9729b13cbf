"""The autoencoder of a latent model: what is encoded and decoded again is to be the image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from diffkd.core.autoencoder import ImageAutoencoder
from diffkd.io.prefetch import to_device
from diffkd.methods.base import Batch, Loss, Method, Stage, Step


class Autoencoding(Method):
    """Error of the decoded images, and a small divergence of the latents from normal ones (Rombach et al.
    2022, without the adversarial and perceptual losses). The error is absolute, as theirs, and squared: on
    large plain areas the absolute one alone learns colours late."""

    reference: ClassVar[str] = "Rombach et al. 2022, https://arxiv.org/abs/2112.10752"
    kind: ClassVar[type[Any]] = ImageAutoencoder

    updates: int = Field(1000, ge=1, description="updates in all")
    learning_rate: float = Field(1e-3, gt=0, description="after the warm-up; falls linearly to zero")
    warmup: int = Field(50, ge=0, description="updates over which the learning rate rises")
    kl: float = Field(1e-6, ge=0, description="weight of the latents' divergence, per image")

    def stages(self, start: Any) -> list[Stage]:
        return [Stage("autoencoder", self.updates, self.learning_rate, self.warmup)]

    def losses(
        self, nets: Mapping[str, Any], batch: Batch, step: Step, rng: torch.Generator
    ) -> Iterator[Loss]:
        student, x0 = nets["student"], batch.x0
        noise = to_device(torch.randn(student.noise_shape(x0), generator=rng), x0.device)
        decoded, divergence = student(x0, noise)
        away = decoded - x0
        error = (away.abs() + away.square()).flatten(1).mean(1)
        loss = error + self.kl * divergence
        yield Loss("student", loss.mean(), {"loss": loss.detach(), "error": error.detach()})
