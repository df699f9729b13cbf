"""The typed object behind a config of `diffkd distill` whose method distils a classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, StringConstraints, model_validator

from diffkd.core.classifier import Classifier
from diffkd.errors import UserError
from diffkd.io.config import Strict
from diffkd.methods.base import Method
from diffkd.methods.logits import Logits
from diffkd.runs.classification.networks import Network
from diffkd.runs.config import TrainingRun
from diffkd.runs.method_config import method_config, parse_method
from diffkd.runs.schedule_config import NoiseSchedule

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,40}$")]  # part of a folder's name
Share = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(gt=0)]


class ClassifierTeacher(Strict):
    """A saved classifier, or one that is trained first, on the labels of all images that are not held out."""

    weights: Path | None = Field(None, description="the folder of a saved one; default to train one")
    model: Network | None = Field(
        None, description="its network; for a saved one only if that is one of your own"
    )
    updates: int = Field(300, ge=1, description="updates, if it is trained here")
    learning_rate: float = Field(3e-3, gt=0, description="after the warm-up, if it is trained here")
    warmup: int = Field(50, ge=0, description="warm-up updates, if it is trained here")

    @model_validator(mode="after")
    def _one(self) -> ClassifierTeacher:
        if self.weights is None and self.model is None:
            raise ValueError("teacher needs either model (a network to train) or weights (a saved one)")
        return self


class Sweep(Strict):
    """The learning curve: one student, distilled with every alpha at every temperature."""

    student: str = Field(description="which of the students")
    alpha: list[Share] = Field(min_length=1, description="shares of the teacher, a line each")
    temperature: list[Temperature] = Field(min_length=1, description="temperatures, from left to right")


def _one_method(given: Any) -> Method:
    if not isinstance(given, list):
        given = [given]
    if len(given) != 1:
        raise UserError("classifiers are distilled by one method, and the config lists several; keep one")
    return parse_method(given[0], Classifier)


class DistillClassifier(TrainingRun):
    """`diffkd distill` of a classifier: a teacher, and students with and without it, on few labels."""

    seed: int = Field(
        0, ge=0, description="of the images held out and of the first training; repeats add 1, 2, ..."
    )
    repeats: int = Field(3, ge=1, le=1000, description="trainings of each model, with consecutive seeds")
    held_out: int = Field(
        ge=1, description="images kept for accuracy: of each class its share, never trained on"
    )
    labelled: int | None = Field(
        None, ge=1, description="of the other images, how many have a label for the students; default all"
    )
    teacher: ClassifierTeacher = Field(description="a saved classifier, or one that is trained first")
    students: dict[Name, Network] = Field(min_length=1, description="their networks by name")
    method: Annotated[Method, BeforeValidator(_one_method), PlainSerializer(method_config)] = Field(
        Logits(), description="how the students are distilled"
    )
    sweep: Sweep | None = Field(
        None, description="a learning curve over alpha and temperature; null for none"
    )
    schedule: NoiseSchedule | None = Field(
        None, description="of a noisy method: the schedule of the denoiser to be guided"
    )

    @model_validator(mode="after")
    def _consistent(self) -> DistillClassifier:
        if isinstance(self.method, Logits) and self.method.alpha == 0:
            raise ValueError(
                "method.alpha is 0, which is the student on labels alone that is trained anyway; use more"
            )
        if self.sweep is not None and not isinstance(self.method, Logits):
            raise ValueError("sweep is over alpha and temperature, which only the method logits has")
        if self.sweep is not None and self.sweep.student not in self.students:
            raise ValueError(
                f"config key sweep.student is {self.sweep.student!r}, which is not one of the students; use "
                f"one of {', '.join(self.students)}"
            )
        if (self.schedule is not None) != self.noisy:
            raise ValueError(
                "a noisy method and a schedule need each other; set method.noisy: true and schedule: {...} "
                "both, or neither"
            )
        return self

    @property
    def noisy(self) -> bool:
        """Whether the students are given noised images and their times."""
        return bool(getattr(self.method, "noisy", False))

    @property
    def seeds(self) -> range:
        """One for each repeat."""
        return range(self.seed, self.seed + self.repeats)
