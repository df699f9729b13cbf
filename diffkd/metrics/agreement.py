"""How near a student lands to its teacher from the same noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffkd.metrics.statistics import Statistics

ROUNDING = 1e-24  # of the squared mean: a spread that is none


class Agreement:
    """Compares image i of one model with image i of another, batch by batch.

    psnr: 10 log10(255² / mean squared error) over all pixels, in dB; infinite for equal images.
    feature_distance: root mean square distance of the features, over that of unrelated images of the teacher,
    which is (2 tr sigma)^½: 0 for equal images, about 1 for unrelated ones.
    """

    def __init__(self, num_features: int, device: torch.device | str = "cpu") -> None:
        self.teacher = Statistics(num_features, device)
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # errors, distances, pixels, images

    def update(
        self, images: Tensor, teacher_images: Tensor, features: Tensor, teacher_features: Tensor
    ) -> None:
        """images: uint8 of equal shapes (B, ...). features: (B, d)."""
        error = (images.double() - teacher_images.double()).square().sum()
        distance = (features.double() - teacher_features.double()).square().sum()
        self.sums[:2] += torch.stack([error, distance])
        self.sums[2] += images.numel()
        self.sums[3] += len(images)
        self.teacher.update(teacher_features)

    def merge_across(self, add: Callable[[Tensor], Tensor]) -> None:
        """Adds up all processes, each of which must call it, with images or without."""
        self.sums = add(self.sums)
        self.teacher.merge_across(add)

    def result(self) -> dict[str, float | None]:
        """None is for what is infinite, which JSON has no number for."""
        error, distance, pixels, images = self.sums.tolist()
        spread = 2 * float(self.teacher.sigma.trace())
        if spread <= ROUNDING * float(self.teacher.mu.square().sum()):
            spread = 0.0  # the teacher's images are all one
        unrelated = math.sqrt(distance / images / spread) if spread else None
        return {
            "psnr": 10 * math.log10(255**2 * pixels / error) if error else None,
            "feature_distance": unrelated if distance else 0.0,
        }
