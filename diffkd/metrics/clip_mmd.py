"""CMMD, the Gaussian kernel distance between CLIP embeddings."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from diffkd.metrics.base import Inputs, Metric, Value
from diffkd.metrics.distances import BLOCK, pair, squared_distances


def cmmd(
    x: Tensor | np.ndarray, y: Tensor | np.ndarray, *, bandwidth: float = 10.0, scale: float = 1000.0
) -> float:
    """CMMD: scale times the squared MMD of a Gaussian kernel (Jayasumana et al. 2024).

    The kernel is exp(-|x - y|² / (2 bandwidth²)). x: (N, d), y: (M, d), CLIP embeddings of unit length. The
    biased estimate, as published: a pair of a sample with itself counts.
    """
    x, y = pair(x, y, 1)

    def mean(a: Tensor, b: Tensor) -> Tensor:
        a, b = a.double(), b.double()
        total = a.new_zeros(())
        for rows in a.split(max(BLOCK // len(b), 1)):
            total += torch.exp(-squared_distances(rows, b) / (2 * bandwidth**2)).sum()
        return total / (len(a) * len(b))

    return scale * float(mean(x, x) + mean(y, y) - 2 * mean(x, y))


class Cmmd(Metric):
    """CMMD of CLIP ViT-L/14-336 embeddings."""

    name: ClassVar[str] = "cmmd"
    values: ClassVar[tuple[Value, ...]] = (Value("cmmd", "CMMD", ".4f"),)
    network: ClassVar[str] = "clip"
    stores_reference: ClassVar[bool] = True
    stores_images: ClassVar[bool] = True

    clip_weights: str | None = Field(None, description="of cmmd; default openai/clip-vit-large-patch14-336")

    def weights(self) -> str | None:
        return self.clip_weights

    def options(self, samples: int, reference: int | None) -> dict[str, Any]:
        return {"bandwidth": 10.0, "scale": 1000.0}

    def compute(self, inputs: Inputs) -> dict[str, float | None]:
        return {"cmmd": cmmd(inputs.reference.features, inputs.images.features, **inputs.options)}
