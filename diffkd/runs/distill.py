"""`diffkd distill`: students from a teacher, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import dropwhile
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from diffkd.core import interval
from diffkd.core.denoiser import Denoiser
from diffkd.core.noise import generator_for
from diffkd.data.absent import NoData, Unseen
from diffkd.data.images import Examples, Images
from diffkd.errors import UserError
from diffkd.methods.base import Method, Stage
from diffkd.models import loading, students
from diffkd.runs import announcement, config_files, pairs
from diffkd.runs.artifacts import RunArtifacts
from diffkd.runs.config import Distill, Train
from diffkd.runs.method_config import method_name
from diffkd.runs.session import ResumeOptions, Session, check_run, identity, open_run
from diffkd.runs.train import train, untrained_teacher
from diffkd.training import launch

TEACHER = "teacher"  # what the run's own is called where its pairs are kept
IMPORTANCE_BATCHES = 8  # that the importance of channels by gradients is summed over


def distill(config: Distill, console: Console, options: ResumeOptions = ResumeOptions()) -> Path:
    """Distils the teacher stage by stage, or resumes that; the folder of the last student."""
    data = config.data
    images: Images | Unseen | None = None if isinstance(data, NoData) else data.load()
    accelerator = launch.make_accelerator(config.training)
    source, teacher_run = config.teacher, None
    if source.train is None:
        teacher = source.load()
    else:
        teacher_run = config_files.load(source.train, Train)
        source = source.model_copy(update={"path": str(teacher_run.out / "teacher"), "train": None})
        teacher = untrained_teacher(teacher_run, teacher_run.data.load())  # enough to check the rest against
    if isinstance(data, NoData):
        images = data.of(teacher.shape, teacher.num_classes)
    assert images is not None
    _check_fits(teacher, images)
    plan = _plan(config, teacher)
    config.check(accelerator)
    if teacher_run is not None:
        check_run(config, accelerator, options)
        train(teacher_run, console, options)
        teacher = source.load()
    for index, (_, stage) in enumerate(plan):
        if stage.pairs is not None and _maker(plan, index) == TEACHER:
            pairs.cache(config, stage, teacher, images.class_counts, TEACHER)  # or refuses others, now
    inputs = {"teacher": identity(teacher)}
    with open_run(config, accelerator, images, console, options, inputs) as session:
        teacher.to(accelerator.device)
        guidance = max((stage.guidance for _, stage in plan), key=lambda w: abs(w - 1))
        baked_in = teacher.guidance_baked_in if guidance == 1 else guidance  # of the teacher's own
        artifacts = RunArtifacts(session, config, images, source, guidance)
        session.say(announcement.data(images))
        session.say(announcement.teacher(teacher, str(source.path), images))
        session.say(announcement.students([(method_name(method), stage) for method, stage in plan]))
        artifacts.announce_measuring(teacher)
        artifacts.teacher_curve(teacher)
        place = config.out / "students"
        _check_exported([place / one.name for _, stage in plan for one in stage.students])
        current = teacher
        del teacher  # from the second stage on it is in memory only while it is sampled
        for index, (method, stage) in enumerate(plan):
            folder = place / stage.name
            if not all((place / one.name).exists() for one in stage.students):
                student = students.copy_of(current) if index else _first_student(config, current, images)
                if index and stage.teacher == "original":
                    current = source.load(accelerator.device)
                artifacts.announce_size(current, student)
                artifacts.forecast([stage for _, stage in plan[index:]])
                examples: Examples = images
                if stage.pairs is not None:
                    maker = _maker(plan, index)
                    examples = pairs.cache(config, stage, current, images.class_counts, maker)
                    pairs.draw(session, examples, current, stage.name)
                _train(session, method, stage, {"teacher": current, "student": student}, examples, index)
                for one in stage.students:
                    artifacts.export(
                        _as_drawn(student, one, main=session.main), place / one.name,
                        teacher=str(source.path), method=type(method).__name__,
                        config=config_files.resolved(config), stage=stage.name, classes=images.classes,
                        class_counts=images.class_counts, guidance_baked_in=baked_in,
                        teacher_sampler=stage.sampler,
                    )  # fmt: skip
                del student
            for one in stage.students:
                current = loading.load(place / one.name, device=accelerator.device)
                steps = current.steps or max(artifacts.teacher_steps(current))
                artifacts.measure(one.name, "student", current, steps, place / one.name)
                artifacts.preview(one.name, current, steps)
                artifacts.announce_stage(one, steps)
        artifacts.finish()
    return folder


def _check_exported(folders: Sequence[Path]) -> None:
    """Raises UserError where a student beyond the first that is to be trained cannot be loaded: one that was
    made before, and changed since."""
    for folder in dropwhile(Path.exists, folders):
        if folder.exists():
            loading.load(folder)


def _maker(plan: Sequence[tuple[Method, Stage]], index: int) -> str:
    """What the teacher of a stage is called: the run's own, or the last student of the stage before."""
    return plan[index - 1][1].name if index and plan[index][1].teacher == "previous" else TEACHER


def _first_student(config: Distill, teacher: Denoiser, images: Images | Unseen) -> Denoiser:
    """The first stage's student, before it is trained."""
    rng = generator_for((config.seed, 0, 0), 0)

    def batches() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for _ in range(IMPORTANCE_BATCHES):
            x0, labels = images.batch(min(config.training.batch_size, len(images)), rng)
            unconditional = teacher.num_classes is None
            yield x0, {} if unconditional or labels is None else {"class_labels": labels}

    return config.student.build(teacher, config.seed, batches())


def _train(
    session: Session,
    method: Method,
    stage: Stage,
    nets: dict[str, Denoiser],
    examples: Examples,
    index: int,
) -> None:
    """Trains nets["student"] in place. The teacher must not be used for anything else afterwards."""
    teacher, student = nets["teacher"].requires_grad_(False), nets["student"].requires_grad_(True)
    if stage.prediction is not None:
        student.prediction = stage.prediction
    student.steps, student.sampler, student.clip = stage.steps, stage.drawn, None  # targets are not clipped
    if stage.interval:
        interval.attach(student.network)
    session.run_stage(method, stage, nets | method.networks(teacher, student), examples, index)


def _as_drawn(student: Denoiser, stage: Stage, *, main: bool) -> Denoiser:
    """A trained student as its pipeline has it: of the stage's steps, whose length is folded in if it took it
    as an input. main: whether this process has the whole of its weights."""
    network = student.network
    if stage.interval and main:
        assert stage.steps is not None
        network = interval.folded(network, 1 / stage.steps)
    drawn = students.with_network(student, network)
    drawn.steps = stage.steps
    return drawn


def _plan(config: Distill, teacher: Denoiser) -> list[tuple[Method, Stage]]:
    """Every stage of every method, checked before anything is trained."""
    plan: list[tuple[Method, Stage]] = []
    student = config.student.build(teacher, config.seed)
    start = teacher
    for method in config.method:
        stages = method.stages(start)
        for stage in stages:
            plan.append((method, stage))
            own = teacher if stage.teacher == "original" else start  # which it learns from
            if len(plan) > 1:
                _check_teacher(stage, own)
            if stage.pairs is not None:
                pairs.check(stage, own)
            if stage is stages[0]:
                method.networks(own, student)
            start = student = students.with_network(student, student.network, stage.prediction)
            start.steps, start.sampler = stage.steps, stage.drawn
            for one in stage.students:
                if one.steps is not None:
                    start.schedule.check_steps(one.steps, one.drawn)
            if stage.interval:
                interval.check(student.network)
    _check_pairs(plan)
    names = [one.name for _, stage in plan for one in stage.students]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two stages are called {name}; give the methods different step counts")
    return plan


def _check_pairs(plan: Sequence[tuple[Method, Stage]]) -> None:
    """Raises UserError where two stages want other pairs of one teacher, which are kept in one place."""
    recipes: dict[str, tuple[Any, ...]] = {}
    for index, (_, stage) in enumerate(plan):
        if stage.pairs is not None:
            recipe = stage.pairs.steps, stage.pairs.sampler, stage.guidance
            maker = _maker(plan, index)
            if recipes.setdefault(maker, recipe) != recipe:
                raise UserError(
                    f"stage {stage.name} wants pairs of {maker} by other steps, sampler or guidance than a "
                    "stage before; give both the same"
                )


def _check_teacher(stage: Stage, teacher: Denoiser) -> None:
    """Raises UserError where a student of few steps is to teach in others, which it knows nothing of."""
    wanted = stage.substeps * (stage.steps or 0)
    if stage.teacher == "original" or stage.pairs is not None or not wanted or teacher.steps is None:
        return
    if wanted != teacher.steps:
        raise UserError(
            f"stage {stage.name} learns from the student before it, which knows its own {teacher.steps} "
            f"steps and no others; let {stage.substeps} x {stage.steps} be these (method.substeps), or set "
            "method.teacher: original where the method has it"
        )


def _check_fits(denoiser: Denoiser, images: Images | Unseen) -> None:
    """Raises UserError where the model does not take the data's images or labels."""
    if isinstance(images, Unseen):
        return  # made to fit
    if denoiser.shape != images.shape:
        raise UserError(
            f"the model makes images of {_size(denoiser.shape)} and the data has {_size(images.shape)} "
            "(channels x height x width); set data.size and data.channels to the model's"
        )
    if denoiser.num_classes is None:
        return
    if images.labels is None:
        raise UserError(
            f"the model is class-conditional and {images.name} has no labels; provide class subfolders"
        )
    highest = int(images.labels.max())
    if highest >= denoiser.num_classes or int(images.labels.min()) < 0:
        raise UserError(
            f"label {highest} of {images.name} is out of range for a model of {denoiser.num_classes} classes"
        )


def _size(shape: tuple[int, int, int] | None) -> str:
    return "x".join(map(str, shape)) if shape else "unknown size"
