"""The typed objects behind the configs of `diffkd train`, `diffkd distill` and `diffkd benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from accelerate import Accelerator
from pydantic import BeforeValidator, Field, model_validator

from diffkd import methods
from diffkd.core.denoiser import Denoiser
from diffkd.data import Data
from diffkd.data.absent import NoData, TeacherDraws
from diffkd.errors import UserError
from diffkd.io.config import Strict
from diffkd.methods.denoising import Denoising
from diffkd.metrics.evaluation import networks
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.evaluation.reference import Reference
from diffkd.models import guidance_input, loading
from diffkd.models.guidance_kind import GuidanceKind
from diffkd.models.quantization import is_quantized
from diffkd.models.students.config import Copy, Lora, Narrow, Student
from diffkd.models.unet import UNet2D
from diffkd.runs import trackers
from diffkd.runs.method_config import DenoiserMethod, method_name
from diffkd.runs.schedule_config import AnySchedule, EDMNoise, NoiseSchedule, kind_of_schedule
from diffkd.training import optimizers
from diffkd.training.config import Training


class TrainingRun(Strict):
    """What the config of every run that trains has."""

    out: Path = Field(description="the run's folder")
    seed: int = Field(0, ge=0, description="of everything random")
    data: Data = Field(description="what is learned from")
    training: Training = Field(Training(), description="batches, optimizer, precision, checkpoints")

    def check(self, accelerator: Accelerator) -> None:
        """Raises UserError for whatever could otherwise fail only after the run folder was made."""
        self.training.parts(accelerator.num_processes)
        optimizers.check(self.training, accelerator)
        trackers.check(self.training.trackers)
        if self.training.compile and accelerator.device.type != "cuda":
            # On CPUs the backward pass that torch 2.13 compiles of a UNet2DModel is wrong (docs/log.md).
            raise UserError(
                f"training.compile needs CUDA, and the device is {accelerator.device.type}; leave it out"
            )


class Settings(Protocol):
    """What is read of the config of any run that measures what it trains."""

    @property
    def data(self) -> Any: ...
    @property
    def evaluation(self) -> Evaluation | None: ...
    @property
    def pictures(self) -> int: ...


def _check_evaluation(evaluation: Evaluation) -> None:
    """Raises UserError for a protocol of its own captions, without FID among the metrics, or without a
    feature network or reference that they need."""
    if evaluation.protocol is not None:
        raise UserError(
            f"evaluation.protocol {evaluation.protocol} is of captions that a file names; it is for diffkd "
            "evaluate and diffkd benchmark"
        )
    if "fid" not in evaluation.metrics:
        raise UserError(
            f"evaluation.metrics {evaluation.metrics} lacks fid, which the report of a run plots; add it"
        )
    networks.check(evaluation, None if evaluation.reference is None else Reference(evaluation.reference))


def teacher_metric(evaluation: Evaluation) -> str | None:
    """The name of a metric that compares each image with the teacher's, if one was chosen."""
    return next((metric.name for metric in evaluation.chosen() if metric.with_teacher), None)


class TeacherRun(TrainingRun):
    """What the config of every run that trains a teacher has."""

    denoising: Denoising = Field(Denoising(), description="how the teacher learns")
    evaluation: Evaluation | None = Field(Evaluation(), description="null for none")
    pictures: int = Field(64, ge=0, le=10_000, description="images of each model in samples/; 0 for none")

    def check(self, accelerator: Accelerator) -> None:
        super().check(accelerator)
        if self.evaluation is None:
            return
        if metric := teacher_metric(self.evaluation):
            raise UserError(
                f"evaluation.metrics has {metric}, which compares students with a teacher: it is for diffkd "
                "distill"
            )
        _check_evaluation(self.evaluation)


class Train(TeacherRun):
    """`diffkd train`: a teacher from images."""

    model: UNet2D = Field(UNet2D(), description="the network")
    schedule: AnySchedule = Field(NoiseSchedule(), description="of the noise")
    prediction: Literal["v_prediction", "epsilon", "sample"] = Field(
        "v_prediction", description="what the network outputs; sample where the schedule is EDM's"
    )
    classes: bool = Field(
        True, description="whether it is conditioned on the data's labels, where the data has any"
    )

    @model_validator(mode="before")
    @classmethod
    def _preconditioned(cls, given: Any) -> Any:
        """A network inside EDM's preconditioning makes x0."""
        if isinstance(given, dict) and kind_of_schedule(given.get("schedule")) == "edm":
            return {"prediction": "sample", **given}
        return given

    @model_validator(mode="after")
    def _predicts_what_it_can(self) -> Train:
        if isinstance(self.schedule, EDMNoise) and self.prediction != "sample":
            raise ValueError(
                f"prediction {self.prediction} is not what EDM's preconditioning makes of a network, which "
                "is sample; leave it out"
            )
        return self


class Opened(Strict):
    """How a pipeline is opened, where its own files leave a choice."""

    variant: str | None = Field(
        None, description="of the weights, such as fp16; default the plain ones, or the only ones"
    )
    scheduler: str | None = Field(
        None, description="the noise scheduler: a scheduler_config.json, a folder or a class; default its own"
    )
    guidance_kind: GuidanceKind | None = Field(
        None, description="of its guidance, where a weight says so: {interval, rescale, worse}; default plain"
    )

    @property
    def opening(self) -> dict[str, Any]:
        """What is given, for `loading.load`."""
        options = {"variant": self.variant, "scheduler": self.scheduler}
        return {key: value for key, value in options.items() if value is not None}


class Teacher(Opened):
    """Where the teacher comes from: one of the two, path or train."""

    path: str | None = Field(None, description="a diffusers pipeline, folder or hub id")
    train: Path | None = Field(
        None, description="a config of `diffkd train`, relative to this file; run first"
    )
    null_label: int | None = Field(
        None, ge=0, description="the label that means no class, where a pipeline has one"
    )

    guidance: float | None = Field(
        None, ge=0, description="a weight baked into a teacher that takes it as an input, such as FLUX.1-dev"
    )

    @model_validator(mode="after")
    def _one(self) -> Teacher:
        if (self.path is None) == (self.train is None):
            raise ValueError("teacher needs either path (a pipeline) or train (a config to train one from)")
        if self.path is None and self.opening:
            raise ValueError(f"teacher.{next(iter(self.opening))} is for teacher.path; leave it out")
        if self.path is None and self.guidance is not None:
            raise ValueError("teacher.guidance is for teacher.path; leave it out")
        return self

    def load(self, device: str | torch.device = "cpu") -> Denoiser:
        """The pipeline at `path`."""
        assert self.path is not None
        teacher = loading.load(self.path, device=device, **self.opening)
        if is_quantized(teacher.network):
            raise UserError(
                f"{self.path} has weights in 8 bits, which no student can go on from; give the pipeline that "
                "they were made of"
            )
        if self.null_label is not None:
            loading.set_null_label(teacher, self.null_label)
        if self.guidance is not None:
            guidance_input.fold(teacher, self.guidance)
        self.guide(teacher)
        return teacher

    def guide(self, teacher: Denoiser) -> None:
        """Gives the teacher its kind of guidance."""
        if self.guidance_kind is not None:
            self.guidance_kind.set_on(teacher)


class Distill(TrainingRun):
    """`diffkd distill`: students from a teacher."""

    teacher: Teacher = Field(description="what students are made from, and learn from")
    student: Student = Field(Copy(), description="the first stage's; each later stage starts from the last")
    method: Annotated[
        list[DenoiserMethod], BeforeValidator(lambda given: given if isinstance(given, list) else [given])
    ] = Field(min_length=1, description="one method or several, whose stages run one after another")
    evaluation: Evaluation | None = Field(Evaluation(), description="null for none")
    pictures: int = Field(64, ge=0, le=10_000, description="images of each model in samples/; 0 for none")
    pairs: Path | None = Field(
        None, description="folder of pairs, for methods that need them; default pairs/ of the run's own"
    )
    cache: Path | None = Field(
        None,
        description="folder of latents and embeddings, of a latent model; default cache/ of the run's own",
    )
    spread_every: int | None = Field(
        50, ge=1, description="updates between looks at the spread of a student's images; null for none"
    )

    @model_validator(mode="after")
    def _fits_data(self) -> Distill:
        """What the config asks of images that it says there are none of."""
        buckets = getattr(self.data, "buckets", None)
        if buckets is not None and self.evaluation is not None and self.evaluation.reference is None:
            raise ValueError(
                f"config key evaluation.reference is missing: data.buckets {buckets} makes images of several "
                "shapes, and FID compares those of one; name a reference, or set evaluation: null"
            )
        if not isinstance(self.data, TeacherDraws):
            return self
        kind = f"data kind {self.data.kind} has none"
        learning = [method for method in self.method if method.learns_from_data()]
        for method in learning:
            if method.learns_what_data_is():
                raise ValueError(
                    f"method {method_name(method)} with these settings learns what images are, and {kind}; "
                    "name the data, or use a method that asks the teacher alone (diffkd methods)"
                )
            if isinstance(self.data, NoData) and self.data.draws is None:
                free = [name for name in methods.names() if not methods.find(name)().learns_from_data()]
                raise ValueError(
                    f"method {method_name(method)} learns from images, and {kind}; name the data, set "
                    f"data.draws for the teacher to draw as many, or use one of {', '.join(free)}"
                )
        if self.data.draws is not None and not learning:
            raise ValueError(
                f"data.draws {self.data.draws} is for methods that learn from images, and none of this "
                "config's does; leave it out"
            )
        if self.evaluation is not None and self.evaluation.reference is None:
            raise ValueError(
                f"config key evaluation.reference is missing: data kind {self.data.kind} has no images to "
                "compare with; name a reference, or set evaluation: null"
            )
        if isinstance(self.student, Narrow) and self.student.importance == "taylor" and not learning:
            raise ValueError(f"student.importance taylor needs images, and {kind}; use norm")
        return self

    def check(self, accelerator: Accelerator) -> None:
        super().check(accelerator)
        buckets = getattr(self.data, "buckets", None)
        if self.training.compile and buckets is not None:
            raise UserError(
                f"training.compile is for images of one shape, and data.buckets is {buckets}; leave one out"
            )
        if isinstance(self.student, Lora) and (engine := optimizers.engine(accelerator)) is not None:
            raise UserError(
                f"student.kind lora does not work under {engine}, which divides weights that all networks "
                "share; use kind: copy, or configs/accelerate/ddp.yaml"
            )
        hooked = [method for method in self.method if method.hooks]
        if self.training.compile and hooked:
            raise UserError(
                f"training.compile bypasses the hooks of method {method_name(hooked[0])}; leave it out"
            )
        if self.evaluation is not None:
            _check_evaluation(self.evaluation)
