"""The typed objects behind the configs of `diffkd train`, `diffkd distill` and `diffkd benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule, from_diffusers
from diffkd.data import Data
from diffkd.errors import printable
from diffkd.io.config import Positive, Strict
from diffkd.methods.base import Method
from diffkd.methods.denoising import Denoising
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.models.families.unet2d import UNet2D
from diffkd.models.quantization import Quantize
from diffkd.models.students import Copy, Student
from diffkd.runs.config_files import check_kind, methods_of
from diffkd.training.config import Training


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

    def build(self) -> Schedule:
        from diffusers import DDIMScheduler

        return from_diffusers(
            DDIMScheduler(
                num_train_timesteps=self.num_train_timesteps,
                beta_schedule=self.beta_schedule,
                beta_start=self.beta_start,
                beta_end=self.beta_end,
                rescale_betas_zero_snr=self.zero_terminal_snr,
            )
        )


class Train(Strict):
    """`diffkd train`: a teacher from images."""

    out: Path = Field(description="the run's folder")
    seed: int = Field(0, ge=0, description="of everything random")
    data: Data
    model: UNet2D = UNet2D()
    schedule: NoiseSchedule = NoiseSchedule()
    prediction: Literal["v_prediction", "epsilon", "sample"] = Field(
        "v_prediction", description="what it outputs"
    )
    classes: bool = Field(
        True, description="whether it is conditioned on the data's labels, where it has any"
    )
    denoising: Denoising = Denoising()
    training: Training = Training()
    evaluation: Evaluation | None = Field(Evaluation(), description="null for none")
    pictures: int = Field(64, ge=0, description="images of each model in samples/; 0 for none")


class Teacher(Strict):
    """Where the teacher comes from: one of the two."""

    path: str | None = Field(None, description="a diffusers pipeline, folder or hub id")
    train: Path | None = Field(
        None, description="a config of `diffkd train`, relative to this file; run first"
    )
    null_label: int | None = Field(
        None, ge=0, description="the label that means no class, where a pipeline has one"
    )

    @model_validator(mode="after")
    def _one(self) -> Teacher:
        if (self.path is None) == (self.train is None):
            raise ValueError("teacher needs either path (a pipeline) or train (a config to train one from)")
        return self


def _denoisers_methods(given: Any) -> list[Method]:
    found = methods_of(given)
    for method in found:
        check_kind(method, Denoiser, "a denoiser")
    return found


class Distill(Strict):
    """`diffkd distill`: students from a teacher."""

    out: Path = Field(description="the run's folder")
    seed: int = Field(0, ge=0, description="of everything random")
    teacher: Teacher
    data: Data
    student: Student = Field(Copy(), description="the first stage's; those after it are made from the last")
    method: Annotated[list[SerializeAsAny[Method]], BeforeValidator(_denoisers_methods)] = Field(
        min_length=1, description="one method or several, whose stages run one after another"
    )
    training: Training = Training()
    evaluation: Evaluation | None = Field(Evaluation(), description="null for none")
    pictures: int = Field(64, ge=0, description="images of each model in samples/; 0 for none")


class BenchmarkEntry(Strict):
    """One model of a benchmark, or the teacher that the others are compared with."""

    path: str = Field(description="a diffusers pipeline, folder or hub id")
    name: str | None = Field(None, description="in the table; default the last part of the path")
    steps: list[Positive] = Field([], description="step counts; default a student's own")
    guidance: float = Field(1.0, ge=0, description="guidance weight; 1 is none")
    null_label: int | None = Field(
        None, ge=0, description="the label that means no class, where a pipeline has one"
    )
    quantize: Quantize | None = Field(None, description="int8: weights in 8 bits (extra quant)")
    stock: bool = Field(False, description="drawn by the pipeline's own code and scheduler")

    @property
    def title(self) -> str:
        return printable(self.name or Path(self.path).name)


class Benchmark(Strict):
    """`diffkd benchmark`: models x steps x metrics, in one table."""

    out: Path = Field(description="the run's folder")
    models: list[BenchmarkEntry] = Field(min_length=1, description="what is measured")
    teacher: BenchmarkEntry | None = Field(None, description="what agreement is with")
    evaluation: Evaluation = Field(description="how; it has to name a reference")

    @model_validator(mode="after")
    def _whole(self) -> Benchmark:
        if self.evaluation.reference is None:
            raise ValueError(
                "config key evaluation.reference is missing; name what to compare with, such as digits"
            )
        for model in self.models:  # those of one name are one line of the plots
            alike = [one for one in self.models if one.title == model.title]
            steps = [count for one in alike for count in one.steps]
            if len({*steps}) < len(steps) or (len(alike) > 1 and not all(one.steps for one in alike)):
                raise ValueError(
                    f"models name {model.title} twice; give one another name, or each steps that differ"
                )
        agreeing = "agreement" in self.evaluation.metrics
        if agreeing and self.teacher is None:
            raise ValueError("config key teacher is missing, which the metric agreement is with; name it")
        if self.teacher is not None and not agreeing:
            raise ValueError(
                f"teacher {self.teacher.path} is for the metric agreement; add that, or leave it out"
            )
        return self
