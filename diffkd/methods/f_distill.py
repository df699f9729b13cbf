"""f-distill (Xu et al. 2025): distribution matching of f-divergences, by a discriminator's density ratio."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffkd.core import scores
from diffkd.core.denoiser import Denoiser
from diffkd.core.discriminator import Heads, block_shapes, middle, non_saturating, seen
from diffkd.core.fake import fake_losses
from diffkd.core.losses import squared_error
from diffkd.core.noise import add_noise
from diffkd.methods import settings
from diffkd.methods.base import Batch, Loss, Method, Needs, Optimization, Stage, Step
from diffkd.models.students.copies import copy_of


class FDistill(Method):
    """Distribution matching of an f-divergence: DMD2's direction, weighted by how likely an image is for the
    teacher.

    The reverse KL forgives what the student leaves out; a forward KL or Jensen-Shannon divergence less so.
    """

    reference: ClassVar[str] = "Xu et al. 2025, https://arxiv.org/abs/2502.15681"
    hooks: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs(
        real=True,
        networks=("fake", "heads"),
        memory="a student's for fake, and its activations up to the heads; little for those",
        in_short="a student's, activations",
        calls="1 student, 1 teacher, 1 fake; then fake_updates times 2 fake (3 with r1), all but the first "
        "with 1 student more",
        passes={"student": 5, "teacher": 1, "fake": 11},
    )

    divergence: scores.Divergence = Field(
        "jensen_shannon", description="of the student's distribution from the teacher's; reverse_kl is dmd2's"
    )
    steps: int = Field(1, ge=1, description="sampling steps of the student")
    drawn: settings.Drawn = "renoise"
    guidance: float = Field(1.0, ge=0, description="guidance weight of the teacher; 1 is unguided")
    teacher: settings.Matched = "original"
    updates: int = Field(500, ge=1, description="updates of the student")
    learning_rate: float = Field(2e-4, gt=0, description="the student's; falls linearly to zero")
    warmup: int = Field(20, ge=0, description="updates over which the learning rates rise")
    fake_updates: int = Field(5, ge=1, description="updates of fake network and heads for one of the student")
    fake_learning_rate: settings.FakeRate = None
    simulate: settings.Simulate = True
    t_min: float = Field(0.02, gt=0, le=1, description="least noise at which the two are compared")
    t_max: float = Field(0.98, gt=0, le=1, description="most noise at which they are compared")
    gan: float = Field(1e-3, ge=0, description="weight of the adversarial loss in the student's")
    gan_fake: settings.FakeGan = 0.01
    gan_learning_rate: settings.HeadsRate = None
    blocks: settings.FakeBlocks = None
    r1: settings.R1 = 0.0
    r1_noise: settings.R1Noise = 0.1
    ratio_min: float = Field(0.1, gt=0, description="least density ratio; smaller ones are cut")
    ratio_max: float = Field(20.0, gt=0, description="largest density ratio; larger ones are cut")
    bins: int = Field(10, ge=1, description="equal bins of noise in which the ratio's mean is made 1")

    @model_validator(mode="after")
    def _fits_together(self) -> FDistill:
        scores.check_drawn(self.drawn, self.simulate)
        for low, high in (("t_min", "t_max"), ("ratio_min", "ratio_max")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(
                    f"{low} {getattr(self, low)} is above {high} {getattr(self, high)}; exchange them"
                )
        return self

    def stages(self, start: Denoiser) -> list[Stage]:
        scores.check_start(start, self.steps, self.guidance, self.drawn)
        fake_rate = self.fake_learning_rate or self.learning_rate
        networks = {
            "fake": Optimization(fake_rate), "heads": Optimization(self.gan_learning_rate or fake_rate),
        }  # fmt: skip
        return [
            Stage(
                f"{self.steps}-steps", self.updates, self.learning_rate, self.warmup, self.steps,
                guidance=self.guidance, drawn=self.drawn, networks=networks,
                teacher=self.teacher, every_time=True,
            )
        ]  # fmt: skip

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        """The fake network, which begins as the teacher, and the discriminator's heads on its blocks."""
        shapes = block_shapes(teacher, self.blocks)
        heads = Heads(shapes if self.blocks else middle(shapes))
        return {"fake": copy_of(teacher).requires_grad_(True), "heads": heads.to(student.device)}

    def losses(
        self, nets: Mapping[str, Any], batch: Batch, step: Step, rng: torch.Generator
    ) -> Iterator[Loss]:
        student, teacher, fake, heads = (nets[name] for name in ("student", "teacher", "fake", "heads"))
        schedule, x0 = student.schedule, batch.x0
        cond: dict[str, Any] = dict(batch.cond)

        def images() -> Tensor:
            return scores.draw(
                student, x0, self.steps, rng, drawn=self.drawn, simulated=self.simulate, **cond
            )

        # 1. the student's images, noised
        x = images()
        t = scores.noise_times(len(x), schedule, self.t_min, self.t_max, rng, x.device)
        x_t = add_noise(schedule, x, t, rng)
        # 2. predicted by the teacher and by the fake network: where the student is off
        with torch.no_grad():
            real = teacher(x_t, t, guidance=step.stage.guidance, **cond)
        with torch.set_grad_enabled(self.gan > 0):
            drawn, features = seen(fake, heads, x_t, t, **cond)
            logits = heads(features)
        # 3. weighted by h(r) of the density ratio r that the discriminator gives, on average 1
        h = scores.divergence_weight(
            self.divergence, scores.density_ratio(logits, t, self.bins, self.ratio_min, self.ratio_max)
        )
        h = (h / h.mean()).reshape(-1, 1, 1, 1)
        direction = h * (drawn - real) / scores.error_size(x, real)
        loss = scores.descent(x, direction)
        if self.gan:
            loss = loss + self.gan * non_saturating(logits)
        gap = squared_error(drawn, real).sqrt()
        metrics = {"t": t, "loss": loss.detach(), "gap": gap, "weight": h.flatten()}
        yield Loss("student", loss.mean(), metrics)
        # 4. the fake network learns the student's images, the heads to tell them from the data
        for learned in fake_losses(
            fake, heads, x, images, x0, self.fake_updates, rng,
            gan=self.gan_fake, r1=self.r1, r1_noise=self.r1_noise, **cond,
        ):  # fmt: skip
            yield Loss(*learned)
