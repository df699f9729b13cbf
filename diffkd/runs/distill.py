"""`diffkd distill`: students from a teacher, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from torch import Tensor

from diffkd.core.denoiser import Denoiser
from diffkd.core.noise import generator_for
from diffkd.data.images import Images
from diffkd.errors import UserError
from diffkd.methods.base import Method, Stage
from diffkd.models import loading, students
from diffkd.runs import config, config_files, session
from diffkd.runs.artifacts import RunArtifacts
from diffkd.runs.session import NO_OPTIONS, ResumeOptions, Session
from diffkd.runs.train import train, untrained_teacher
from diffkd.training import launch

SCORED = 8  # batches that the importance of channels by gradients is the sum over


def distill(settings: config.Distill, console: Console, terms: ResumeOptions = NO_OPTIONS) -> Path:
    """Distils the teacher stage by stage, or goes on where it stopped; the folder of the last student."""
    images = settings.data.load()
    accelerator = launch.make_accelerator(settings.training)
    teaching, source = None, str(settings.teacher.path)
    if settings.teacher.train is not None:
        teaching = config_files.load(settings.teacher.train, config.Train)
        source = str(teaching.out / "teacher")
        teacher = untrained_teacher(
            teaching, teaching.data.load()
        )  # what it will be, enough to check the rest against
    else:
        teacher = _teacher(settings, source)
    _check_fits(teacher, images)
    plan = _plan(settings, teacher)
    session.check(settings, accelerator)
    if teaching is not None:
        train(teaching, console, terms)
        teacher = _teacher(settings, source)
    inputs = {"teacher": session.identity(teacher)}
    with session.open_run(settings, accelerator, images, console, terms, inputs) as job:
        results = RunArtifacts(job, settings, images)
        teacher.to(accelerator.device)
        guidance = max((stage.guidance for _, stage in plan), key=lambda w: abs(w - 1))
        results.teacher = lambda: _teacher(settings, source).to(accelerator.device), guidance
        results.source = source
        results.teacher_curve(teacher, [stage.steps for _, stage in plan if stage.steps], guidance)
        current = teacher
        del teacher  # from the second stage on it is in memory only while it is drawn
        for index, (method, stage) in enumerate(plan):
            folder = settings.out / "students" / stage.name
            if not folder.exists():
                student = _begun(settings, current, images) if index == 0 else students.copy_of(current)
                results.tell_sizes(current, student)
                _train(job, method, stage, {"teacher": current, "student": student}, images, index)
                results.export(
                    student,
                    folder,
                    teacher=source,
                    method=type(method).__name__,
                    config=config_files.resolved(settings),
                    stage=stage.name,
                    classes=images.classes,
                    class_counts=images.class_counts,
                    guidance_baked_in=guidance,
                )
                del student
            current = loading.load(folder, device=accelerator.device)
            steps = current.steps or max(results.teacher_steps(current))
            results.measure(stage.name, "student", current, steps, folder)
            results.preview(stage.name, current, steps)
            results.stage_line(stage, steps)
        results.finish()
    return folder


def _begun(settings: config.Distill, teacher: Denoiser, images: Images) -> Denoiser:
    """The first stage's student as it begins."""
    rng = generator_for((settings.seed, 0, 0), 0)

    def batches() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for _ in range(SCORED):
            x0, labels = images.batch(min(settings.training.batch_size, len(images)), rng)
            unconditional = teacher.num_classes is None
            yield x0, {} if unconditional or labels is None else {"class_labels": labels}

    return settings.student.build(teacher, settings.seed, batches())


def _train(
    job: Session, method: Method, stage: Stage, nets: dict[str, Denoiser], images: Images, index: int
) -> None:
    """Trains nets["student"] in place. The teacher is not to be used for anything else after."""
    teacher, student = nets["teacher"].requires_grad_(False), nets["student"].requires_grad_(True)
    if stage.prediction is not None:
        student.prediction = stage.prediction
    student.steps, student.clip = stage.steps, None  # its targets were not clipped
    job.run_stage(method, stage, nets | method.networks(teacher, student), images, index)


def _plan(settings: config.Distill, teacher: Denoiser) -> list[tuple[Method, Stage]]:
    """Every stage of every method, checked before anything is trained."""
    plan: list[tuple[Method, Stage]] = []
    student = settings.student.build(teacher, settings.seed)
    start = teacher
    for method in settings.method:
        stages = method.stages(start)
        plan += [(method, stage) for stage in stages]
        method.networks(start, student)
        for stage in stages:
            start = student = students.with_network(student, student.network, stage.prediction)
            start.steps = stage.steps
    names = [stage.name for _, stage in plan]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two stages are called {name}; give the methods step counts that differ")
    return plan


def _teacher(settings: config.Distill, source: str) -> Denoiser:
    teacher = loading.load(source)
    null_label = settings.teacher.null_label
    if null_label is not None:
        loading.name_null_label(teacher, null_label)
    return teacher


def _check_fits(denoiser: Denoiser, images: Images) -> None:
    """Raises UserError where the data's images or labels are not what the model takes."""
    if denoiser.shape != images.shape:
        raise UserError(
            f"the model makes images of {_size(denoiser.shape)} and the data has {_size(images.shape)} "
            "(channels x height x width); set data.size and data.channels to the model's"
        )
    if denoiser.num_classes is None:
        return
    if images.labels is None:
        raise UserError(
            f"the model is class-conditional and {images.name} has no labels; give class subfolders"
        )
    highest = int(images.labels.max())
    if highest >= denoiser.num_classes or int(images.labels.min()) < 0:
        raise UserError(
            f"label {highest} of {images.name} is out of range for a model of {denoiser.num_classes} classes"
        )


def _size(shape: tuple[int, int, int] | None) -> str:
    return "x".join(map(str, shape)) if shape else "unknown size"
