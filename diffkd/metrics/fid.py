"""The Fréchet distance between the features of two sets of images (Heusel et al. 2017, equation 6)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance


class FID:
    """FID against one reference, whose statistics are computed once. Sums are float64.

    features: uint8 (B, C, H, W) -> (B, num_features). Images come as uint8 batches (B, H, W, C).
    """

    def __init__(
        self, features: nn.Module, reference: Iterable[Tensor], device: torch.device | str = "cpu"
    ) -> None:
        self.metric = FrechetInceptionDistance(feature=features, reset_real_features=False).to(device)
        self.count = self._add(reference, real=True)

    def __call__(self, images: Iterable[Tensor]) -> float:
        """The distance of these images from the reference."""
        self.metric.reset()
        self._add(images, real=False)
        return float(self.metric.compute())

    @torch.no_grad()
    def _add(self, batches: Iterable[Tensor], *, real: bool) -> int:
        count = 0
        for batch in batches:
            self.metric.update(batch.permute(0, 3, 1, 2).to(self.metric.device), real=real)
            count += len(batch)
        return count
