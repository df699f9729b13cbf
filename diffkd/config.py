"""The typed objects behind the configs of `diffkd train`, `diffkd distill` and `diffkd benchmark`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator

from diffkd import method as methods
from diffkd.base import Positive, Strict, UserError
from diffkd.data import Data
from diffkd.method import Method
from diffkd.methods.denoising import Denoising
from diffkd.metrics.evaluation import Evaluation
from diffkd.models.unet2d import UNet2D
from diffkd.schedules import Schedule, from_diffusers
from diffkd.strict_yaml import one_line, read
from diffkd.text import printable, quoted, reason
from diffkd.training import Training


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


def _method(given: Any) -> Any:
    """{"name": ..., fields} -> the Method, or a list of such."""
    if isinstance(given, list) and not any(isinstance(one, list) for one in given):
        return [_method(one)[0] for one in given]
    if isinstance(given, Method):
        return [given]
    if not isinstance(given, Mapping):
        raise UserError(
            f"method {quoted(given)} is no mapping with a name; use one of {', '.join(methods.names())}"
        )
    kind = methods.find(str(given.get("name", "progressive")))
    try:
        return [kind.model_validate({key: value for key, value in given.items() if key != "name"})]
    except ValidationError as error:
        raise UserError(one_line(error, kind, "method")) from error


class Distill(Strict):
    """`diffkd distill`: students from a teacher."""

    out: Path = Field(description="the run's folder")
    seed: int = Field(0, ge=0, description="of everything random")
    teacher: Teacher
    data: Data
    method: Annotated[list[SerializeAsAny[Method]], BeforeValidator(_method)] = Field(
        min_length=1, description="one method or several, whose stages run one after another"
    )
    training: Training = Training()
    evaluation: Evaluation | None = Field(Evaluation(), description="null for none")
    pictures: int = Field(64, ge=0, description="images of each model in samples/; 0 for none")


class Measured(Strict):
    """One model of a benchmark, or the teacher that the others are compared with."""

    path: str = Field(description="a diffusers pipeline, folder or hub id")
    name: str | None = Field(None, description="in the table; default the last part of the path")
    steps: list[Positive] = Field([], description="step counts; default a student's own")
    guidance: float = Field(1.0, ge=0, description="guidance weight; 1 is none")
    null_label: int | None = Field(
        None, ge=0, description="the label that means no class, where a pipeline has one"
    )
    stock: bool = Field(False, description="drawn by the pipeline's own code and scheduler")

    @property
    def title(self) -> str:
        return printable(self.name or Path(self.path).name)


class Benchmark(Strict):
    """`diffkd benchmark`: models x steps x metrics, in one table."""

    out: Path = Field(description="the run's folder")
    models: list[Measured] = Field(min_length=1, description="what is measured")
    teacher: Measured | None = Field(None, description="what agreement is with")
    evaluation: Evaluation = Field(description="how; it has to name a reference")

    @model_validator(mode="after")
    def _whole(self) -> Benchmark:
        if self.evaluation.reference is None:
            raise ValueError(
                "config key evaluation.reference is missing; name what to compare with, such as digits"
            )
        titles = [model.title for model in self.models]
        for model in self.models:
            if titles.count(model.title) > 1 or len({*model.steps}) < len(model.steps):
                raise ValueError(f"models name {model.title} twice; give one another name, or other steps")
        agreeing = "agreement" in self.evaluation.metrics
        if agreeing and self.teacher is None:
            raise ValueError("config key teacher is missing, which the metric agreement is with; name it")
        if self.teacher is not None and not agreeing:
            raise ValueError(
                f"teacher {self.teacher.path} is for the metric agreement; add that, or leave it out"
            )
        return self


Config = TypeVar("Config", Train, Distill, Benchmark)


def load(path: Path, kind: type[Config], overrides: Sequence[str] = ()) -> Config:
    """A config file with `key.sub=value` overrides.

    Raises UserError, which for an unknown key names the nearest known one.
    """
    content = read(path, overrides)
    teacher = content.get("teacher")
    if isinstance(teacher, dict) and isinstance(teacher.get("train"), str):
        try:
            named = (path.parent / teacher["train"]).resolve()
        except ValueError as error:
            raise UserError(
                f"config key teacher.train is {quoted(teacher['train'])}, no path ({reason(error)})"
            ) from error
        teacher["train"] = str(named)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise UserError(one_line(error, kind)) from error


def resolved(config: Train | Distill | Benchmark) -> dict[str, Any]:
    """The config as plain data, every default written out; the run folder keeps it."""
    content = config.model_dump(mode="json")
    if isinstance(config, Distill):
        names = [type(m).__module__.removeprefix("diffkd.methods.") for m in config.method]
        content["method"] = [{"name": n, **m} for n, m in zip(names, content["method"], strict=True)]
    return content
