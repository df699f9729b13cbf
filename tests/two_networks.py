"""A method of two networks that learn: it uses every part of the contract, for tests of the contract."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from diffkd.core.denoiser import Denoiser
from diffkd.core.losses import squared_error
from diffkd.core.noise import add_noise, grid_times
from diffkd.methods.base import Batch, Loss, Method, Optimization, Stage, Step


class Judge(nn.Module):
    """Says of images how they should be: (B, 1, H, W) -> (B, 1, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.inner = nn.Conv2d(1, 6, 3, padding=1)
        self.outer = nn.Conv2d(6, 1, 3, padding=1)
        for param in self.parameters():
            param.data = torch.randn(param.shape, generator=generator) * 0.2

    def forward(self, x: Tensor) -> Tensor:
        judged: Tensor = self.outer(self.inner(x).tanh())
        return judged


class TwoNetworks(Method):
    """The student learns from the data, its teacher, and more and more from a judge, which learns too."""

    reference: ClassVar[str] = "for tests, 2026, https://example.org"

    updates: int = Field(50, ge=1, description="updates in all")
    learning_rate: float = Field(5e-4, gt=0, description="falls linearly to zero")

    def stages(self, start: Denoiser) -> list[Stage]:
        judge = Optimization(learning_rate=4 * self.learning_rate, betas=(0.5, 0.9), ema=0.8)
        stage = Stage("4-steps", self.updates, self.learning_rate, steps=4, drawn="renoise")
        return [replace(stage, networks={"judge": judge})]

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        return {"judge": Judge().to(student.device)}

    def losses(
        self, nets: Mapping[str, Any], batch: Batch, step: Step, rng: torch.Generator
    ) -> Iterator[Loss]:
        student, judge, x0 = nets["student"], nets["judge"], batch.x0
        assert step.stage.steps is not None
        t, _ = grid_times(len(x0), step.stage.steps, rng, x0.device)
        x_t = add_noise(student.schedule, x0, t, rng)
        with torch.no_grad():
            target = (nets["teacher"](x_t, t, **batch.cond) + x0) / 2
        denoised = student(x_t, t, **batch.cond)
        gap = squared_error(denoised, target)
        loss = gap + step.progress * squared_error(judge(denoised), x0)
        yield Loss("student", loss.mean(), {"t": t, "loss": loss.detach(), "gap": gap.detach().sqrt()})
        yield Loss("judge", squared_error(judge(denoised.detach()), x0).mean())
