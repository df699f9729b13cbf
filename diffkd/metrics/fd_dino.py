"""FD-DINOv2: the Fréchet distance of DINOv2 features (Stein et al. 2023)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from diffkd.metrics.base import Inputs, Metric, Value
from diffkd.metrics.frechet import distance


class FdDino(Metric):
    """Fréchet distance of DINOv2 ViT-L/14 features."""

    name: ClassVar[str] = "fd_dino"
    values: ClassVar[tuple[Value, ...]] = (Value("fd_dino", "FD-DINOv2", ".2f"),)
    network: ClassVar[str] = "dinov2"

    dinov2_weights: str | None = Field(None, description="of fd_dino; default facebook/dinov2-large")

    def weights(self) -> str | None:
        return self.dinov2_weights

    def compute(self, inputs: Inputs) -> dict[str, float | None]:
        return {"fd_dino": distance(inputs.images.gaussian, inputs.reference.gaussian)}
