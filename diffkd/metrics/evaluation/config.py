"""How models and images are measured: the config of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffkd.core import samplers
from diffkd.io.config import Positive, Strict
from diffkd.metrics.evaluation.image_sets import Spec
from diffkd.metrics.features.resize import Resize

MetricName = Literal["fid", "kid", "is", "prdc", "fd_inf", "fd_dino", "cmmd", "agreement"]


class Evaluation(Strict):
    """How models are measured."""

    features: str = Field(
        "digits", description="digits, inception, dinov2, clip, or an nn.Module's dotted path"
    )
    weights: str | None = Field(None, description="file or folder of the feature network's weights")
    resize: Resize | None = Field(None, description="of inception features; default tf1, as the original")
    dtype: Literal["float32", "float64"] | None = Field(
        None, description="of inception features; default float32"
    )
    metrics: list[MetricName] = Field(["fid"], min_length=1, description="what to compute")
    reference: Spec | None = Field(None, description="what to compare with; default the data of the run")
    samples: int | None = Field(
        None, ge=2, description="generated images; default as many as the reference has"
    )
    labels: Literal["data", "balanced"] | list[int] = Field(
        "data",
        description="class labels: the reference's own in order, every class in turn, or these in turn",
    )
    teacher_steps: list[Positive] = Field(
        [64], description="step counts of the teacher's curve, beside the students' own"
    )
    sampler: samplers.SamplerName = Field("ddim", description="of teacher and students")
    batch_size: int = Field(256, ge=1, description="images sampled at a time")
    seed: int = Field(0, ge=0, description="image i starts from the noise of seed + i")
    kid_subsets: int = Field(100, ge=1, description="subsets that KID is the mean over")
    kid_subset_size: int = Field(1000, ge=2, description="images in each")
    is_splits: int = Field(10, ge=1, description="parts that the Inception Score is the mean over")
    precision_k: int = Field(3, ge=1, description="nearest neighbour that precision and recall reach to")
    density_k: int = Field(5, ge=1, description="nearest neighbour that density and coverage reach to")
    bootstrap: int = Field(0, ge=0, description="resamplings for FID's 95% interval; 0 for none")
    dinov2_weights: str | None = Field(None, description="of fd_dino; default facebook/dinov2-large")
    clip_weights: str | None = Field(None, description="of cmmd; default openai/clip-vit-large-patch14-336")
    allow_mismatch: bool = Field(False, description="whether reference statistics by other features are used")
