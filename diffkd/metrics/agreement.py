"""How near a student lands to its teacher from the same noise."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch

from diffkd.metrics.base import Add, Batch, Inputs, Metric, Running, Value
from diffkd.metrics.statistics import Statistics

ROUNDING = 1e-24  # of the squared mean; a smaller spread is rounding error


class Agreement:
    """Compares image i of one model with image i of another, batch by batch.

    psnr: 10 log10(255² / mean squared error) over all pixels, in dB; infinite for equal images.
    feature_distance: root mean square distance of the features, over that of unrelated images of the teacher,
    which is (2 tr sigma)^½: 0 for equal images, about 1 for unrelated ones.
    """

    def __init__(self, num_features: int, device: torch.device | str = "cpu") -> None:
        self.teacher = Statistics(num_features, device)
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # errors, distances, pixels, images

    def update(self, batch: Batch) -> None:
        """Images of equal shapes, with their features and the teacher's."""
        assert batch.teacher_images is not None and batch.teacher_features is not None
        error = (batch.images.double() - batch.teacher_images.double()).square().sum()
        distance = (batch.features.double() - batch.teacher_features.double()).square().sum()
        self.sums[:2] += torch.stack([error, distance])
        self.sums[2] += batch.images.numel()
        self.sums[3] += len(batch.images)
        self.teacher.update(batch.teacher_features)

    def merge_across(self, add: Add) -> None:
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


class TeacherAgreement(Metric):
    """PSNR and feature distance to a teacher that starts from the same noise."""

    name: ClassVar[str] = "agreement"
    values: ClassVar[tuple[Value, ...]] = (
        Value("psnr", "PSNR to teacher, dB", ".2f"),
        Value("feature_distance", "feature distance to teacher", ".3f"),
    )
    with_teacher: ClassVar[bool] = True

    def running(self, network: Any, count: int, device: torch.device) -> Running:
        return Agreement(network.num_features, device)

    def compute(self, inputs: Inputs) -> dict[str, float | None]:
        found: dict[str, float | None] = inputs.running.result()
        return found
