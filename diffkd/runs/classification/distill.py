"""The whole job of distilling a classifier: teachers, and students on labels alone and with the teacher."""

from __future__ import annotations

import dataclasses
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
from diffkd.io.files import new_folder
from diffkd.methods.base import Method, Stage
from diffkd.methods.logits import Logits
from diffkd.runs import config_files, session
from diffkd.runs.classification import networks
from diffkd.runs.classification.artifacts import ClassifierArtifacts
from diffkd.runs.classification.config import Classify
from diffkd.runs.classification.networks import Network
from diffkd.runs.session import NO_OPTIONS, ResumeOptions, Session
from diffkd.training import launch

Role = Literal["teacher", "labels", "distilled"]


@dataclass(frozen=True)
class TrainingJob:
    """One training. model: "teacher", or a student's name. role: labels is a student without its teacher."""

    model: str
    role: Role
    seed: int
    network: Network
    method: Method

    @property
    def name(self) -> str:
        """Of the stage, and of the folder."""
        what = {"teacher": "", "labels": "-labels", "distilled": "-distilled"}[self.role]
        if self.role == "distilled" and isinstance(self.method, Logits):
            what = f"-alpha-{self.method.alpha}-T-{self.method.temperature}"
        return f"{self.model}{what}-seed-{self.seed}"

    def folder(self, out: Path) -> Path:
        return out / ("teachers" if self.role == "teacher" else "students") / self.name


@dataclass(frozen=True)
class TrainingData:
    """What every lesson is taken from. held_out: what accuracy is measured with. rest: what is left."""

    settings: Classify
    held_out: Images
    rest: Images

    def classifier(self, network: Network, seed: int, name: str, *, noisy: bool) -> Classifier:
        """A new one. It depends on the seed and the name alone: a student begins alike in all its lessons."""
        schedule = self.settings.schedule.build() if noisy and self.settings.schedule else None
        classes, shape = len(self.rest.classes), self.rest.shape
        with torch.random.fork_rng():
            torch.manual_seed(derived_seed(seed, *name.encode()))
            built = network.build(shape, classes, timed=noisy)
        return Classifier(built, classes, shape=shape, schedule=schedule)

    def fresh(self, lesson: TrainingJob) -> Classifier:
        noisy = self.settings.noisy and lesson.role != "teacher"
        return self.classifier(lesson.network, lesson.seed, lesson.model, noisy=noisy)

    def images(self, lesson: TrainingJob) -> Images:
        """A teacher's have all their labels. With a teacher the images without a label are worth as much as
        the others; on labels alone they say nothing, and would only make batches of a few labels each: a
        student on labels alone is at its best with batches of labelled images."""
        if lesson.role == "teacher":
            return self.rest
        labelled, hidden = splits.few_labels(self.rest, self.settings.labelled, lesson.seed)
        return labelled if lesson.role == "labels" else hidden

    @cached_property
    def saved_teacher(self) -> Classifier | None:
        """That of the config's folder. Raises UserError where it is none for these images."""
        given = self.settings.teacher
        if given.weights is None:
            return None
        own = given.model.build(self.rest.shape, len(self.rest.classes)) if given.model else None
        teacher = networks.load(given.weights, own)
        if teacher.schedule is not None:
            raise UserError(
                f"teacher {given.weights} is of noised images, and a teacher labels clean ones; give another"
            )
        if (teacher.num_classes, teacher.shape) != (len(self.rest.classes), self.rest.shape):
            raise UserError(
                f"teacher {given.weights} is of {teacher.num_classes} classes and images of {teacher.shape}, "
                f"and the students of {len(self.rest.classes)} and {self.rest.shape}; use the teacher's data"
            )
        return teacher

    def teacher(self, seed: int) -> Classifier:
        """Of a lesson of that seed, on the CPU."""
        if self.saved_teacher is not None:
            return self.saved_teacher
        lesson = next(one for one in _teachers(self.settings) if one.seed == seed)
        own = lesson.network.name not in networks.BUILTIN_NETWORKS
        network = self.fresh(lesson).network if own else None
        return networks.load(lesson.folder(self.settings.out), network)


def distill(settings: Classify, console: Console, terms: ResumeOptions = NO_OPTIONS) -> Path:
    """Trains what is not trained yet, or goes on where it stopped; the run's folder."""
    images = settings.data.load()
    accelerator = launch.make_accelerator(settings.training)
    material = TrainingData(settings, *splits.hold_out(images, settings.held_out, settings.seed))
    splits.few_labels(material.rest, settings.labelled, settings.seed)
    lessons = list(_training_jobs(material))
    saved = material.saved_teacher
    inputs = {} if saved is None else {"teacher": digest(saved.network.state_dict())}
    with session.open_run(settings, accelerator, images, console, terms, inputs) as job:
        results = ClassifierArtifacts(job, settings, material.held_out)
        if saved is not None:
            results.add({"name": "teacher", "model": "teacher", "role": "teacher"}, saved)
        for index, lesson in enumerate(lessons):
            folder = lesson.folder(settings.out)
            if not folder.exists():
                student = _taught(job, material, lesson, index)
                if accelerator.is_main_process:
                    _export(job, material, lesson, student, results.measured(student))
                accelerator.wait_for_everyone()
            results.add_saved(folder)
        results.finish()
    return settings.out


def _teachers(settings: Classify) -> list[TrainingJob]:
    how = settings.teacher
    if how.weights is not None:
        return []
    assert how.model is not None
    method = Logits(alpha=0, updates=how.updates, learning_rate=how.learning_rate, warmup=how.warmup)
    seeds = range(settings.seed, settings.seed + settings.repeats)
    return [TrainingJob("teacher", "teacher", seed, how.model, method) for seed in seeds]


def _training_jobs(material: TrainingData) -> Iterator[TrainingJob]:
    """All of a run in their order, each once. Raises UserError for networks that do not fit."""
    settings = material.settings
    teachers = _teachers(settings)
    for lesson in teachers[:1]:
        material.fresh(lesson)
    yield from teachers
    seeds = range(settings.seed, settings.seed + settings.repeats)
    done = set()
    for name, network in settings.students.items():
        stage = _stage(
            settings.method, material.classifier(network, settings.seed, name, noisy=settings.noisy)
        )
        alone = Logits(
            alpha=0, updates=stage.updates, learning_rate=stage.learning_rate, warmup=stage.warmup,
            noisy=settings.noisy,
        )  # fmt: skip
        for seed in seeds:
            yield TrainingJob(name, "labels", seed, network, alone)
            lesson = TrainingJob(name, "distilled", seed, network, settings.method)
            done.add(lesson.name)
            yield lesson
    if settings.sweep is None:
        return
    name = settings.sweep.student
    for alpha in settings.sweep.alpha:
        for temperature in settings.sweep.temperature:
            method = settings.method.model_copy(update={"alpha": alpha, "temperature": temperature})
            for seed in seeds:
                lesson = TrainingJob(name, "distilled", seed, settings.students[name], method)
                if lesson.name not in done:
                    done.add(lesson.name)
                    yield lesson


def _stage(method: Method, student: Classifier) -> Stage:
    stages = method.stages(student)
    if len(stages) != 1:
        raise UserError(
            f"method {config_files.name_of(method)} has {len(stages)} stages; a classifier is distilled in one"
        )
    return stages[0]


def _taught(job: Session, material: TrainingData, lesson: TrainingJob, index: int) -> Classifier:
    """The student of one lesson; under FSDP whole in the main process only."""
    student = material.fresh(lesson).to(job.accelerator.device).train().requires_grad_(True)
    nets: dict[str, Any] = {"student": student}
    if lesson.role == "distilled":
        nets["teacher"] = material.teacher(lesson.seed).requires_grad_(False)
        nets |= lesson.method.networks(nets["teacher"], student)
    stage = dataclasses.replace(_stage(lesson.method, student), name=lesson.name)
    job.run_stage(lesson.method, stage, nets, material.images(lesson), index, seed=lesson.seed)
    return student.eval()


def _export(
    job: Session, material: TrainingData, lesson: TrainingJob, student: Classifier, measured: dict[str, Any]
) -> None:
    record = {
        "name": lesson.name,
        "model": lesson.model,
        "role": lesson.role,
        "seed": lesson.seed,
        "method": {"name": config_files.name_of(lesson.method), **lesson.method.model_dump(mode="json")},
        **measured,
    }
    settings = material.settings
    with new_folder(lesson.folder(settings.out)) as temporary:
        networks.save(
            student, lesson.network, temporary, classes=material.rest.classes, data=material.rest.name,
            record=record, config=config_files.resolved(settings),
        )  # fmt: skip
        job.run.sync_log()  # the lesson is not done again: what it logged must not be lost
