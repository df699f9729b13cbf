"""The typed objects behind the configs of `diffkd train` for latent models, one of each kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from diffkd.core.schedules import FlowSchedule, Shift
from diffkd.io.config import Strict
from diffkd.methods.denoising import Denoising
from diffkd.models.new.dit import NewDiT
from diffkd.models.new.sd3 import NewSD3
from diffkd.models.new.text_to_image import TextToImage
from diffkd.runs.config import TeacherRun
from diffkd.runs.latent_teacher.autoencoding import Autoencoding
from diffkd.runs.schedule_config import NoiseSchedule

# the error in the velocity, at times whose logit is normal (Esser et al. 2024, section 3.1)
FLOW_MATCHING = {"weight": "flow", "times": "log_normal", "mean": 0.0, "std": 1.0}


class TrainLatent(TeacherRun):
    """`diffkd train`: an autoencoder, then a teacher of its latents. model: a `models.new.NewPipeline`."""

    model: Any = Field(description="of its kind")
    schedule: Any = Field(description="of its kind")
    prediction: Any = Field(description="of its kind")
    autoencoding: Autoencoding = Field(Autoencoding(), description="how the autoencoder learns")
    guidance: float = Field(1.0, ge=0, description="guidance weight that it is measured with")

    @model_validator(mode="after")
    def _learns_what_guides_it(self) -> TrainLatent:
        if self.denoising.label_dropout == 0 and self.guidance != 1:
            raise ValueError(
                "denoising.label_dropout 0 teaches it nothing without label or prompt, which guidance "
                f"{self.guidance:g} leads away from; use 0.1, or guidance 1"
            )
        return self


class TrainTextToImage(TrainLatent):
    """A StableDiffusionPipeline, from captioned images."""

    model: TextToImage = Field(description="the pipeline's networks")
    schedule: NoiseSchedule = Field(NoiseSchedule(), description="of the noise")
    prediction: Literal["v_prediction", "epsilon", "sample"] = Field(
        "v_prediction", description="what the network outputs"
    )
    guidance: float = Field(3.0, ge=0, description="guidance weight that it is measured with")


class TrainDiT(TrainLatent):
    """A DiTPipeline, from labelled images."""

    model: NewDiT = Field(description="the pipeline's networks")
    schedule: NoiseSchedule = Field(NoiseSchedule(), description="of the noise")
    prediction: Literal["v_prediction", "epsilon", "sample"] = Field(
        "v_prediction", description="what the network outputs"
    )

    @model_validator(mode="after")
    def _knows_no_class(self) -> TrainDiT:
        if self.denoising.label_dropout == 0:
            raise ValueError(
                "denoising.label_dropout 0 leaves the label for no class untrained, by which a DiT is "
                "guided; use 0.1"
            )
        return self


class NewFlow(Strict):
    """The flow that a teacher is trained with."""

    shift: float = Field(
        1.0,
        gt=0,
        description="of the times of its steps; above 1 more of them near noise",
    )
    num_train_timesteps: int = Field(1000, ge=2, le=100_000, description="T; its network is given T sigma")

    def build(self) -> FlowSchedule:
        return FlowSchedule(Shift(self.shift), self.num_train_timesteps, handed=False)


def _of_a_flow(given: Any) -> Any:
    return {**FLOW_MATCHING, **given} if isinstance(given, Mapping) else given


class TrainSD3(TrainLatent):
    """A StableDiffusion3Pipeline, from captioned images, by flow matching."""

    model: NewSD3 = Field(description="the pipeline's networks")
    schedule: NewFlow = Field(NewFlow(), description="of the noise")
    prediction: Literal["flow"] = Field("flow", description="what the network outputs")
    denoising: Annotated[Denoising, BeforeValidator(_of_a_flow)] = Field(
        Denoising.model_validate(FLOW_MATCHING), description="how the teacher learns"
    )
    guidance: float = Field(3.0, ge=0, description="guidance weight that it is measured with")


KINDS: dict[str, type[TrainLatent]] = {  # by model.kind
    "text_to_image": TrainTextToImage, "dit": TrainDiT, "sd3": TrainSD3
}  # fmt: skip
