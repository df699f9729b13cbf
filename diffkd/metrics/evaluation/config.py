"""How models and images are measured: the config of it, of which each metric brings its own keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, create_model, model_validator

from diffkd import metrics
from diffkd.core import samplers
from diffkd.data.resized import LARGEST_SIDE
from diffkd.io.config import LARGEST_BATCH, MOST_IMAGES, Positive, Strict
from diffkd.metrics.base import Metric
from diffkd.metrics.evaluation import presets
from diffkd.metrics.evaluation.image_sets import Spec
from diffkd.metrics.features import in_config
from diffkd.metrics.features.resize import Resize

if TYPE_CHECKING:
    MetricName = str
else:
    MetricName = Literal[tuple(metrics.kinds())]


class _Common(Strict):
    """How models are measured."""

    protocol: presets.PresetName | None = Field(
        None,
        description="coco30k: FID (and CLIP score) of 30,000 captions at 256x256, in all that it takes; or "
        "the tool whose FID it is to be: pytorch-fid, clean-fid, torch-fidelity, edm, adm",
    )
    features: Annotated[str, AfterValidator(in_config)] = Field(
        "digits",
        description="digits, shapes, inception, dinov2, clip, a .safetensors of diffkd features train, or "
        "your own: a module, or module.Class",
    )
    weights: str | None = Field(None, description="file or folder of the feature network's weights")
    resize: Resize | None = Field(
        None, description="how inception takes images in: tf1 (default), clean, pytorch-fid or torchmetrics"
    )
    dtype: Literal["float32", "float64"] | None = Field(
        None, description="of inception features; default float32"
    )
    metrics: list[MetricName] = Field(["fid"], min_length=1, description="what to compute")
    reference: Spec | None = Field(None, description="what to compare with; default the data of the run")
    samples: int | None = Field(
        None, ge=2, le=MOST_IMAGES, description="generated images; default as many as the reference has"
    )
    image_size: int | None = Field(
        None,
        ge=1,
        le=LARGEST_SIDE,
        description="height and width that images are brought to before they are measured, by resizing the "
        "short side (bicubic) and cropping the centre; default as they are",
    )
    labels: Literal["data", "balanced"] | list[int] = Field(
        "data",
        description="class labels: the reference's own in order, every class in turn, or these in turn",
    )
    teacher_steps: list[Positive] = Field(
        [64], description="step counts at which the teacher is measured, and no others"
    )
    sampler: samplers.SamplerName | None = Field(
        None, description="of teacher and students; default each model's own"
    )
    batch_size: int = Field(256, ge=1, le=LARGEST_BATCH, description="images sampled at a time")
    seed: int = Field(0, ge=0, description="image i starts from the noise of seed + i")
    allow_mismatch: bool = Field(False, description="whether reference statistics by other features are used")

    @model_validator(mode="before")
    @classmethod
    def _by_protocol(cls, given: Any) -> Any:
        if isinstance(given, dict) and str(given.get("protocol")) in presets.PRESETS:
            return presets.completed(given)
        return given

    def chosen(self) -> list[Metric]:
        """The metrics that it names, each once, with their own keys."""
        return [
            kind.model_validate({key: getattr(self, key) for key in kind.model_fields})
            for kind in map(metrics.kinds().__getitem__, dict.fromkeys(self.metrics))
        ]


def _keys_of_metrics() -> dict[str, Any]:
    return {
        key: (field.annotation, field)
        for kind in metrics.kinds().values()
        for key, field in kind.model_fields.items()
    }


if TYPE_CHECKING:

    class Evaluation(_Common):
        """How models are measured."""

else:
    Evaluation = create_model(
        "Evaluation", __base__=_Common, __doc__=_Common.__doc__, __module__=__name__, **_keys_of_metrics()
    )
