"""The noise schedules that teachers are trained with, as configs give them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from diffkd.core.schedules import BetaSchedule, EDMSchedule, from_betas
from diffkd.io.config import Strict


class NoiseSchedule(Strict):
    """The noise schedule that a teacher is trained with."""

    beta_schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear"] = Field(
        "squaredcos_cap_v2", description="diffusers' name; squaredcos_cap_v2 is cosine"
    )
    num_train_timesteps: int = Field(
        1024, ge=2, le=100_000, description="T; students take step counts that divide it"
    )
    beta_start: float = Field(1e-4, gt=0, lt=1, description="of the linear schedules")
    beta_end: float = Field(0.02, gt=0, lt=1, description="of the linear schedules")
    zero_terminal_snr: bool = Field(True, description="whether the last step is pure noise")

    def build(self) -> BetaSchedule:
        from diffusers import DDIMScheduler

        return from_betas(
            DDIMScheduler(
                num_train_timesteps=self.num_train_timesteps,
                beta_schedule=self.beta_schedule,
                beta_start=self.beta_start,
                beta_end=self.beta_end,
                rescale_betas_zero_snr=self.zero_terminal_snr,
            )
        )


class EDMNoise(Strict):
    """EDM's noise levels and preconditioning (Karras et al. 2022), for a teacher that is trained so."""

    kind: Literal["edm"]
    sigma_min: float = Field(0.002, gt=0, description="least noise level")
    sigma_max: float = Field(80.0, gt=0, description="largest noise level, which sampling begins with")
    rho: float = Field(7.0, gt=0, description="how much more levels there are near sigma_min")
    sigma_data: float = Field(0.5, gt=0, description="standard deviation of the data, in [-1, 1]")
    num_train_timesteps: int = Field(1000, ge=2, le=100_000, description="T; no student has more steps")

    def build(self) -> EDMSchedule:
        return EDMSchedule(
            self.sigma_min, self.sigma_max, self.rho, self.sigma_data, self.num_train_timesteps
        )


def kind_of_schedule(given: Any) -> str:
    """The config class of a schedule: that of betas needs no kind."""
    kind = given.get("kind") if isinstance(given, dict) else getattr(given, "kind", None)
    return "edm" if kind == "edm" else "betas"


AnySchedule = Annotated[
    Annotated[NoiseSchedule, Tag("betas")] | Annotated[EDMNoise, Tag("edm")],
    Discriminator(kind_of_schedule),
]
