"""DMD2 (Yin et al. 2024): the student's distribution is led to the teacher's by a difference of scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffkd.core.denoiser import Denoiser
from diffkd.core.discriminator import Heads, block_shapes, middle, non_saturating, seen
from diffkd.core.fake import fake_losses
from diffkd.core.losses import squared_error
from diffkd.core.noise import add_noise
from diffkd.core.scores import check_drawn, check_start, descent, draw, error_size, noise_times
from diffkd.methods import settings
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
        memory="a student's for fake, with gan its activations up to the heads; little for those",
        in_short="a student's, (activations)",
        calls="1 student, 1 teacher, 1 fake; then fake_updates times 1 fake (2 with gan, 3 with r1), all but "
        "the first with 1 student more",
        passes={"student": 5, "teacher": 1, "fake": 6},
    )

    steps: int = Field(1, ge=1, description="sampling steps of the student")
    drawn: settings.Drawn = "renoise"
    guidance: float = Field(1.0, ge=0, description="guidance weight of the teacher; 1 is unguided")
    teacher: settings.Matched = "original"
    updates: int = Field(500, ge=1, description="updates of the student")
    learning_rate: float = Field(2e-4, gt=0, description="the student's; falls linearly to zero")
    warmup: int = Field(20, ge=0, description="updates over which the learning rates rise")
    fake_updates: int = Field(5, ge=1, description="updates of the fake network for one of the student")
    fake_learning_rate: settings.FakeRate = None
    simulate: settings.Simulate = True
    t_min: float = Field(0.02, gt=0, le=1, description="least noise at which the two are compared")
    t_max: float = Field(0.98, gt=0, le=1, description="most noise at which they are compared")
    gan: float = Field(0.0, ge=0, description="weight of the adversarial loss in the student's; 0 has none")
    gan_fake: settings.FakeGan = 0.01
    gan_learning_rate: settings.HeadsRate = None
    blocks: settings.FakeBlocks = None
    r1: settings.R1 = 0.0
    r1_noise: settings.R1Noise = 0.1

    @model_validator(mode="after")
    def _fits_together(self) -> DMD2:
        check_drawn(self.drawn, self.simulate)
        if self.t_min > self.t_max:
            raise ValueError(f"t_min {self.t_min} is above t_max {self.t_max}; exchange them")
        if not self.gan:
            self._check_no_discriminator()
        return self

    def _check_no_discriminator(self) -> None:
        for name in ("gan_fake", "gan_learning_rate", "blocks", "r1", "r1_noise"):
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} {value} is of the discriminator, which gan: 0 does not have; leave it out, or "
                    "give gan a weight"
                )

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
        drawn, features = seen(fake, heads, x_t, t, **cond)
        # 3. a step against the gradient of the reverse KL, and towards what the discriminator takes for real
        loss = descent(x, (drawn - real) / error_size(x, real))
        if heads is not None:
            loss = loss + self.gan * non_saturating(heads(features))
        gap = squared_error(drawn, real).sqrt()
        yield Loss("student", loss.mean(), {"t": t, "loss": loss.detach(), "gap": gap})
        # 4. the fake network learns the student's images, the heads to tell them from the data
        for learned in fake_losses(
            fake, heads, x, images, x0, self.fake_updates, rng,
            gan=self.gan_fake, r1=self.r1, r1_noise=self.r1_noise, **cond,
        ):  # fmt: skip
            yield Loss(*learned)
