"""`diffkd distill` of a classifier: teachers, and students on labels alone and with the teacher."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from diffkd.core.classifier import Classifier
from diffkd.core.digest import digest
from diffkd.core.noise import derived_seed
from diffkd.data import splits
from diffkd.data.images import Images
from diffkd.errors import UserError
from diffkd.methods.base import Method, Stage
from diffkd.methods.logits import Logits
from diffkd.runs import announcement
from diffkd.runs.classification import networks, report
from diffkd.runs.classification.artifacts import ClassifierArtifacts
from diffkd.runs.classification.config import DistillClassifier
from diffkd.runs.classification.networks import Network
from diffkd.runs.method_config import method_config, method_name
from diffkd.runs.session import ResumeOptions, Session, open_run
from diffkd.training import launch


@dataclass(frozen=True)
class TrainingJob:
    """One training. model: "teacher", or a student's name. role: "labels" for one without its teacher."""

    model: str
    role: Literal["teacher", "labels", "distilled"]
    seed: int
    network: Network
    method: Method

    @property
    def name(self) -> str:
        """Of the stage, and of the folder."""
        suffix = {"teacher": "", "labels": "-labels", "distilled": "-distilled"}[self.role]
        if self.role == "distilled" and isinstance(self.method, Logits):
            suffix = f"-alpha-{self.method.alpha}-T-{self.method.temperature}"
        return f"{self.model}{suffix}-seed-{self.seed}"

    def folder(self, out: Path) -> Path:
        return out / ("teachers" if self.role == "teacher" else "students") / self.name

    def describe(self) -> dict[str, Any]:
        """What its record says besides the numbers."""
        named = {"name": self.name, "model": self.model, "role": self.role, "seed": self.seed}
        return {**named, "method": method_config(self.method)}


@dataclass(frozen=True)
class TrainingData:
    """The images of a run. held_out: those that accuracy is measured with. rest: all others."""

    config: DistillClassifier
    held_out: Images
    rest: Images

    def untrained(self, job: TrainingJob) -> Classifier:
        """It depends on the seed and the model's name alone: a student starts alike in all its trainings."""
        timed = self.config.noisy and job.role != "teacher"
        schedule = self.config.schedule.build() if timed and self.config.schedule else None
        classes, shape = len(self.rest.classes), self.rest.shape
        with torch.random.fork_rng():
            torch.manual_seed(derived_seed(job.seed, *job.model.encode()))
            network = job.network.build(shape, classes, timed=timed)
        return Classifier(network, classes, shape=shape, schedule=schedule)

    def images(self, job: TrainingJob) -> Images:
        """A teacher's have all their labels. With a teacher, images without a label are worth as much as the
        others; on labels alone they teach nothing, and would only make batches with few labels each."""
        if job.role == "teacher":
            return self.rest
        labelled, hidden = splits.few_labels(self.rest, self.config.labelled, job.seed)
        return labelled if job.role == "labels" else hidden

    @cached_property
    def saved_teacher(self) -> Classifier | None:
        """The one that the config names. Raises UserError where it does not fit these images."""
        source = self.config.teacher
        if source.weights is None:
            return None
        shape, classes = self.rest.shape, len(self.rest.classes)
        teacher = networks.load(source.weights, source.model.build(shape, classes) if source.model else None)
        if teacher.schedule is not None:
            raise UserError(
                f"teacher {source.weights} takes noised images, and a teacher labels clean ones; use another"
            )
        if (teacher.num_classes, teacher.shape) != (classes, shape):
            raise UserError(
                f"teacher {source.weights} has {teacher.num_classes} classes and images of {teacher.shape}, "
                f"and the students have {classes} and {shape}; use the teacher's data"
            )
        return teacher

    def teacher(self, seed: int) -> Classifier:
        """That of a student's seed, on the CPU."""
        if self.saved_teacher is not None:
            return self.saved_teacher
        job = next(job for job in teacher_jobs(self.config) if job.seed == seed)
        own = None if job.network.builtin else self.untrained(job).network
        return networks.load(job.folder(self.config.out), own)


def distill(config: DistillClassifier, console: Console, options: ResumeOptions = ResumeOptions()) -> Path:
    """Trains whatever is not trained yet, or resumes that; the run's folder."""
    images = config.data.load()
    accelerator = launch.make_accelerator(config.training)
    data = TrainingData(config, *splits.hold_out(images, config.held_out, config.seed))
    splits.few_labels(data.rest, config.labelled, config.seed)  # refuses a count that does not fit
    jobs = training_jobs(data)
    saved = data.saved_teacher
    inputs = {} if saved is None else {"teacher": digest(saved.network.state_dict())}
    with open_run(config, accelerator, images, console, options, inputs) as session:
        artifacts = ClassifierArtifacts(session, config, data.held_out)
        session.say(announcement.data(images))
        left = [job for job in jobs if not job.folder(config.out).exists()]
        session.say(f"to train: {len(left)} of {len(jobs)} classifiers, on {len(data.rest):,} images")
        if saved is not None:
            artifacts.add_teacher(saved)
        for folder in (job.folder(config.out) for job in jobs):
            if folder.exists():
                artifacts.add(folder)  # or refuses what was changed, before anything is trained
        for index, job in enumerate(jobs):
            folder = job.folder(config.out)
            if folder.exists():
                session.update += getattr(job.method, "updates", 0)
            else:
                left.remove(job)
                session.forecast.later = sum(getattr(other.method, "updates", 0) for other in left)
                student = _train(session, data, job, index)
                artifacts.export(student, job.network, folder, job.describe())
                artifacts.add(folder)
        if session.main:
            report.write(session, config, len(data.held_out))
    return config.out


def teacher_jobs(config: DistillClassifier) -> list[TrainingJob]:
    source = config.teacher
    if source.weights is not None:
        return []
    assert source.model is not None
    method = Logits(alpha=0, updates=source.updates, learning_rate=source.learning_rate, warmup=source.warmup)
    return [TrainingJob("teacher", "teacher", seed, source.model, method) for seed in config.seeds]


def training_jobs(data: TrainingData) -> list[TrainingJob]:
    """All of a run in order, each once. Raises UserError for networks that do not fit."""
    teachers = teacher_jobs(data.config)
    for job in teachers[:1]:
        data.untrained(job)
    jobs = [*teachers, *_student_jobs(data), *_sweep_jobs(data.config)]
    return list({job.name: job for job in jobs}.values())


def _student_jobs(data: TrainingData) -> Iterator[TrainingJob]:
    config = data.config
    for name, network in config.students.items():
        distilled = TrainingJob(name, "distilled", config.seed, network, config.method)
        stage = _stage(config.method, data.untrained(distilled))
        alone = Logits(
            alpha=0, updates=stage.updates, learning_rate=stage.learning_rate, warmup=stage.warmup,
            noisy=config.noisy,
        )  # fmt: skip
        for seed in config.seeds:
            yield TrainingJob(name, "labels", seed, network, alone)
            yield dataclasses.replace(distilled, seed=seed)


def _sweep_jobs(config: DistillClassifier) -> Iterator[TrainingJob]:
    if config.sweep is None:
        return
    name = config.sweep.student
    for alpha, temperature in itertools.product(config.sweep.alpha, config.sweep.temperature):
        method = config.method.model_copy(update={"alpha": alpha, "temperature": temperature})
        for seed in config.seeds:
            yield TrainingJob(name, "distilled", seed, config.students[name], method)


def _stage(method: Method, student: Classifier) -> Stage:
    stages = method.stages(student)
    if len(stages) != 1:
        raise UserError(
            f"method {method_name(method)} has {len(stages)} stages; a classifier is distilled in one"
        )
    return stages[0]


def _train(session: Session, data: TrainingData, job: TrainingJob, index: int) -> Classifier:
    """The trained student; under FSDP complete in the main process only."""
    student = data.untrained(job).to(session.accelerator.device).train().requires_grad_(True)
    nets: dict[str, Any] = {"student": student}
    if job.role == "distilled":
        nets["teacher"] = data.teacher(job.seed).requires_grad_(False)
        nets |= job.method.networks(nets["teacher"], student)
    stage = dataclasses.replace(_stage(job.method, student), name=job.name)
    session.run_stage(job.method, stage, nets, data.images(job), index, seed=job.seed)
    return student.eval()
