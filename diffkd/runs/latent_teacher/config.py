"""The typed objects behind the configs of `diffkd train` for latent models, one of each kind."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from diffkd.models.new.dit import NewDiT
from diffkd.models.new.text_to_image import TextToImage
from diffkd.runs.config import NoiseSchedule, TeacherRun
from diffkd.runs.latent_teacher.autoencoding import Autoencoding


class TrainLatent(TeacherRun):
    """`diffkd train`: an autoencoder, then a teacher of its latents. model: a `models.new.NewPipeline`."""

    model: Any = Field(description="of its kind")
    schedule: NoiseSchedule = NoiseSchedule()
    prediction: Literal["v_prediction", "epsilon", "sample"] = Field(
        "v_prediction", description="what the network outputs"
    )
    autoencoding: Autoencoding = Autoencoding()
    guidance: float = Field(1.0, ge=0, description="guidance weight that it is measured with")


class TrainTextToImage(TrainLatent):
    """A StableDiffusionPipeline, from captioned images."""

    model: TextToImage
    guidance: float = Field(3.0, ge=0, description="guidance weight that it is measured with")


class TrainDiT(TrainLatent):
    """A DiTPipeline, from labelled images."""

    model: NewDiT

    @model_validator(mode="after")
    def _knows_no_class(self) -> TrainDiT:
        if self.denoising.label_dropout == 0:
            raise ValueError(
                "denoising.label_dropout 0 leaves the label for no class untrained, by which a DiT is "
                "guided; use 0.1"
            )
        return self


KINDS: dict[str, type[TrainLatent]] = {"text_to_image": TrainTextToImage, "dit": TrainDiT}  # by model.kind
