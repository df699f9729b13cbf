"""The typed object behind a config of `diffkd distill` whose method distils a classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, StringConstraints, model_validator

from diffkd import methods
from diffkd.core.classifier import Classifier
from diffkd.data import Data
from diffkd.errors import UserError
from diffkd.io.config import Strict, read_yaml
from diffkd.methods.base import Method
from diffkd.methods.logits import Logits
from diffkd.runs import config_files
from diffkd.runs.classification.networks import Network
from diffkd.runs.config import Distill, NoiseSchedule
from diffkd.training.config import Training

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,40}$")]  # a part of a folder's name
Share = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ClassifierTeacher(Strict):
    """A saved classifier, or one that is trained first, on the labels of all images that are not held out."""

    weights: Path | None = Field(None, description="the folder of a saved one; default to train one")
    model: Network | None = Field(
        None, description="its network; for a saved one only where that is of your own making"
    )
    updates: int = Field(300, ge=1, description="updates of one that is trained here")
    learning_rate: float = Field(3e-3, gt=0, description="the same one's, after the warm-up")
    warmup: int = Field(50, ge=0, description="the same one's")

    @model_validator(mode="after")
    def _one(self) -> ClassifierTeacher:
        if self.weights is None and self.model is None:
            raise ValueError("teacher needs either model (a network to train) or weights (a saved one)")
        return self


class Sweep(Strict):
    """The learning curve: one student, distilled with every alpha at every temperature."""

    student: str = Field(description="which of the students")
    alpha: list[Share] = Field(min_length=1, description="shares of the teacher, each a line")
    temperature: list[Temperature] = Field(min_length=1, description="temperatures, from left to right")


def _one_method(given: Any) -> Method:
    found = config_files.methods_of(given)
    if len(found) != 1:
        raise UserError("classifiers are distilled by one method, and the config lists several; keep one")
    config_files.check_kind(found[0], Classifier, "a classifier")
    return found[0]


class Classify(Strict):
    """`diffkd distill` of a classifier: a teacher, and students with and without it, on few labels."""

    out: Path = Field(description="the run's folder")
    seed: int = Field(
        0, ge=0, description="of the images held out, and of the first training; others add 1, 2, ..."
    )
    repeats: int = Field(3, ge=1, description="trainings of each model, by seeds in a row")
    data: Data
    held_out: int = Field(
        ge=1, description="images kept for accuracy: of each class its share, never trained on"
    )
    labelled: int | None = Field(
        None, ge=1, description="of the other images, how many have a label for the students; default all"
    )
    teacher: ClassifierTeacher
    students: dict[Name, Network] = Field(min_length=1, description="their networks by name")
    method: Annotated[SerializeAsAny[Method], BeforeValidator(_one_method)] = Field(
        Logits(), description="how the students are distilled"
    )
    sweep: Sweep | None = Field(
        None, description="a learning curve over alpha and temperature; null for none"
    )
    schedule: NoiseSchedule | None = Field(
        None, description="of a noisy method: the schedule of the denoiser that is to be guided"
    )
    training: Training = Training()

    @model_validator(mode="after")
    def _whole(self) -> Classify:
        if isinstance(self.method, Logits) and self.method.alpha == 0:
            raise ValueError(
                "method.alpha is 0, the student on labels alone, which is trained beside the other; use more"
            )
        if self.sweep is not None and not isinstance(self.method, Logits):
            raise ValueError("sweep is over alpha and temperature, which only the method logits has")
        if self.sweep is not None and self.sweep.student not in self.students:
            raise ValueError(
                f"config key sweep.student is {self.sweep.student!r}, none of the students; use one of "
                f"{', '.join(self.students)}"
            )
        if (self.schedule is not None) != self.noisy:
            raise ValueError(
                "a schedule is for a method that is noisy, and that needs one; set method.noisy: true and "
                "schedule: {...} both, or neither"
            )
        return self

    @property
    def noisy(self) -> bool:
        """Whether the students are given noised images and their times."""
        return bool(getattr(self.method, "noisy", False))


def load(path: Path, overrides: Sequence[str] = ()) -> Distill | Classify:
    """A config of `diffkd distill`: what its method distils says which of the two it is."""
    given = read_yaml(path, overrides).get("method")
    for one in given if isinstance(given, list) else [given]:
        name = one.get("name") if isinstance(one, Mapping) else None
        if isinstance(name, str) and methods.find(name).kind is Classifier:
            return config_files.load(path, Classify, overrides)
    return config_files.load(path, Distill, overrides)
