"""The typed object behind the config of `diffkd train` for text-to-image models."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffkd.methods.denoising import Denoising
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.models.text_to_image import TextToImage
from diffkd.runs.config import NoiseSchedule, TrainingRun
from diffkd.runs.text_to_image.autoencoding import Autoencoding


class TrainTextToImage(TrainingRun):
    """`diffkd train`: a text-to-image teacher from captioned images, in two stages."""

    model: TextToImage
    schedule: NoiseSchedule = NoiseSchedule()
    prediction: Literal["v_prediction", "epsilon", "sample"] = Field(
        "v_prediction", description="what the network outputs"
    )
    autoencoding: Autoencoding = Autoencoding()
    denoising: Denoising = Denoising()
    guidance: float = Field(3.0, ge=0, description="guidance weight that it is measured with")
    evaluation: Evaluation | None = Field(Evaluation(), description="null for none")
    pictures: int = Field(64, ge=0, le=10_000, description="images in samples/; 0 for none")
