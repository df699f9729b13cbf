"""DMD2 (Yin et al. 2024): the student's distribution is led to the teacher's by a difference of scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffkd.core.denoiser import Denoiser, StockSampler
from diffkd.core.discriminator import (
    Heads,
    accuracy,
    block_shapes,
    logistic,
    middle,
    non_saturating,
    seen,
)
from diffkd.core.losses import squared_error
from diffkd.core.noise import add_noise
from diffkd.core.scores import (
    check_drawn,
    check_start,
    denoising_error,
    descent,
    draw,
    error_size,
    noise_times,
)
from diffkd.methods.base import Batch, Loss, Method, Needs, Optimization, Stage, Step
from diffkd.models.students.copies import copy_of


class DMD2(Method):
    """Distribution matching: the reverse KL between noised images falls by the difference of two scores.

    One is the teacher's, the other that of a fake network, which learns the student's images all the while.
    """

    reference: ClassVar[str] = "Yin et al. 2024, https://arxiv.org/abs/2405.14867"
    needs: ClassVar[Needs] = Needs(
        data=False,
        networks=("fake", "heads with gan"),
        memory="a student's for fake; little for heads",
        calls="1 student, 1 teacher, 1 fake; then fake_updates times 1 student and 1 fake",
    )

    steps: int = Field(1, ge=1, description="sampling steps of the student")
    drawn: StockSampler = Field(
        "renoise", description="the student's sampler; ddim, as after progressive, learns through all steps"
    )
    guidance: float = Field(1.0, ge=0, description="guidance weight of the teacher; 1 is unguided")
    teacher: str = Field(
        "original",
        description="whose distribution is matched: the run's teacher's, or previous, or a student's",
    )
    updates: int = Field(500, ge=1, description="updates of the student")
    learning_rate: float = Field(2e-4, gt=0, description="the student's; falls linearly to zero")
    warmup: int = Field(20, ge=0, description="updates over which the learning rates rise")
    fake_updates: int = Field(5, ge=1, description="updates of the fake network for one of the student")
    fake_learning_rate: float | None = Field(
        None, gt=0, description="of the fake network; default the student's"
    )
    simulate: bool = Field(
        True, description="whether later steps start from the student's own images, or from noised data"
    )
    t_min: float = Field(0.02, gt=0, le=1, description="least noise at which the two are compared")
    t_max: float = Field(0.98, gt=0, le=1, description="most noise at which they are compared")
    gan: float = Field(0.0, ge=0, description="weight of the adversarial loss in the student's; 0 has none")
    gan_fake: float = Field(
        0.01, ge=0, description="weight of the discriminator's loss in the fake network's"
    )
    gan_learning_rate: float | None = Field(
        None, gt=0, description="of its heads; default the fake network's"
    )
    blocks: list[str] | None = Field(
        None,
        min_length=1,
        description="the fake network's modules that have a head; default the middle block",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> DMD2:
        check_drawn(self.drawn, self.simulate)
        if self.t_min > self.t_max:
            raise ValueError(f"t_min {self.t_min} is above t_max {self.t_max}; exchange them")
        return self

    def learns_from_data(self) -> bool:
        """By its discriminator, and where later steps start from noised data."""
        return self.gan > 0 or not (self.simulate or self.steps == 1)

    def learns_what_data_is(self) -> bool:
        """By its discriminator."""
        return self.gan > 0

    @property
    def hooks(self) -> bool:  # type: ignore[override]
        return self.gan > 0

    def stages(self, start: Denoiser) -> list[Stage]:
        check_start(start, self.steps, self.guidance, self.drawn)
        fake_rate = self.fake_learning_rate or self.learning_rate
        networks = {"fake": Optimization(fake_rate)}
        if self.gan:
            networks["heads"] = Optimization(self.gan_learning_rate or fake_rate)
        return [
            Stage(
                f"{self.steps}-steps", self.updates, self.learning_rate, self.warmup, self.steps,
                guidance=self.guidance, drawn=self.drawn, networks=networks,
                teacher=self.teacher, every_time=True,
            )
        ]  # fmt: skip

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        """The fake network, which begins as the teacher, and the discriminator's heads on its blocks."""
        fake = copy_of(teacher).requires_grad_(True)
        if not self.gan:
            return {"fake": fake}
        shapes = block_shapes(teacher, self.blocks)
        heads = Heads(shapes if self.blocks else middle(shapes))
        return {"fake": fake, "heads": heads.to(student.device)}

    def losses(
        self, nets: Mapping[str, Any], batch: Batch, step: Step, rng: torch.Generator
    ) -> Iterator[Loss]:
        student, teacher, fake = (nets[name] for name in ("student", "teacher", "fake"))
        heads: Heads | None = nets.get("heads")
        schedule, x0 = student.schedule, batch.x0
        cond: dict[str, Any] = dict(batch.cond)

        def images() -> Tensor:
            return draw(student, x0, self.steps, rng, drawn=self.drawn, simulated=self.simulate, **cond)

        # 1. the student's images, noised
        x = images()
        t = noise_times(len(x), schedule, self.t_min, self.t_max, rng, x.device)
        x_t = add_noise(schedule, x, t, rng)
        # 2. predicted by the teacher and by the fake network: where the student is off
        with torch.no_grad():
            real = teacher(x_t, t, guidance=step.stage.guidance, **cond)
        with torch.set_grad_enabled(heads is not None):
            drawn, features = seen(fake, heads, x_t, t, **cond)
        # 3. a step against the gradient of the reverse KL, and towards what the discriminator takes for real
        loss = descent(x, (drawn - real) / error_size(x, real))
        if heads is not None:
            loss = loss + self.gan * non_saturating(heads(features))
        gap = squared_error(drawn, real).sqrt()
        yield Loss("student", loss.mean(), {"t": t, "loss": loss.detach(), "gap": gap.detach()})
        for k in range(self.fake_updates):
            # 4. the fake network learns the student's images at every noise level
            if k:
                with torch.no_grad():
                    x = images()
            x = x.detach()
            t = noise_times(len(x), schedule, 0.0, 1.0, rng, x.device)
            denoised, features = seen(fake, heads, add_noise(schedule, x, t, rng), t, **cond)
            loss = error = denoising_error(fake, denoised, x, t)
            if heads is not None:
                # 5. and to tell them from the data; then the heads do
                _, others = seen(fake, heads, add_noise(schedule, x0, t, rng), t, **cond)
                loss = error + self.gan_fake * logistic(heads(others), heads(features))
            yield Loss("fake", loss.mean(), {"t": t, "loss": error.detach()})
            if heads is not None:
                logits, told = (heads([f.detach() for f in found]) for found in (others, features))
                yield Loss(
                    "heads", logistic(logits, told).mean(), {"t": t, "accuracy": accuracy(logits, told)}
                )
