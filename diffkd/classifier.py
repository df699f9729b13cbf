"""Any network as class logits, of clean images or of noised ones; guidance by one that knows noise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffkd.denoiser import Denoiser
from diffkd.schedules import Schedule, Time


class Classifier(nn.Module):
    """A network read as logits: (B, C, H, W) -> (B, K), or noise-conditional, (B, C, H, W), (B,) -> (B, K).

    network: called as network(x), or with a schedule as network(x_t, time), time (B,) as the schedule's own
    networks are given it. num_classes: K. shape: (C, H, W) of an image.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        *,
        shape: tuple[int, int, int] | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        self.network, self.num_classes, self.shape, self.schedule = network, num_classes, shape, schedule

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.network.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.network.parameters()), torch.float32)

    def forward(self, x: Tensor, t: Time | None = None) -> Tensor:
        """Logits (B, K) float32. t: (B,) in (0, 1], of a noise-conditional one, whose x is x_t."""
        x = x.to(self.dtype)
        if self.schedule is None:
            assert t is None
            found: Tensor = self.network(x)
        else:
            assert t is not None
            found = self.network(x, self.schedule.network_time(t, x))
        return found.float()


Model = Denoiser | Classifier  # what a method's teacher and student are
