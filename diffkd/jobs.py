"""The two whole jobs behind the command: a teacher from images, students from a teacher."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from diffkd import cards, config, models, pictures, report, students
from diffkd.base import UserError
from diffkd.data import Images
from diffkd.denoiser import Denoiser
from diffkd.engine import Interrupted, derived_seed, run_stage
from diffkd.generation import generate
from diffkd.method import Method, Stage
from diffkd.metrics.evaluation import Evaluator
from diffkd.runs import Run, new_folder, read_json, write_json

log = logging.getLogger("diffkd")
PREVIEW = 64  # images of a grid in samples/
TEACHER_STEPS = 64  # of a preview of a teacher that is not measured


def train(settings: config.Train, console: Console) -> Path:
    """Trains a teacher, or goes on where it stopped; the folder of its pipeline."""
    images = settings.data.load()
    accelerator = _accelerator(settings)
    with _held(settings, accelerator) as job:
        job.images, job.console = images, console
        folder = settings.out / "teacher"
        method = settings.denoising
        if not folder.exists():
            denoiser = _fresh(settings, images).to(accelerator.device).train()
            stage = method.stages(denoiser)[0]
            job.run_stage(method, stage, {"student": denoiser}, 0)
            job.export(denoiser.eval(), folder, data=images.name, classes=images.classes)
        denoiser = models.load(folder, device=accelerator.device)
        _check_fits(denoiser, images)
        for steps in settings.evaluation.teacher_steps if settings.evaluation else []:
            job.measure("teacher", "teacher", denoiser, steps, folder)
        job.preview("teacher", denoiser, _preview_steps(settings, denoiser))
        job.finish()
    return folder


def distill(settings: config.Distill, console: Console) -> Path:
    """Distils the teacher stage by stage, or goes on where it stopped; the folder of the last student."""
    images = settings.data.load()
    if settings.teacher.train is not None:
        teaching = config.load(settings.teacher.train, config.Train)
        console.print(f"teacher: {settings.teacher.train}")
        source = str(train(teaching, console))
    else:
        source = str(settings.teacher.path)
    accelerator = _accelerator(settings)
    teacher = _teacher(settings, source)
    _check_fits(teacher, images)
    plan = _plan(settings.method, teacher)
    with _held(settings, accelerator) as job:
        job.images, job.console = images, console
        teacher.to(accelerator.device)
        guidance = max((stage.guidance for _, stage in plan), key=lambda w: abs(w - 1))
        job.teacher_curve(teacher, [stage.steps for _, stage in plan if stage.steps], guidance)
        current = teacher
        for index, (method, stage) in enumerate(plan):
            folder = settings.out / "students" / stage.name
            if not folder.exists():
                student = students.copy_of(current, stage.prediction).requires_grad_(True)
                student.steps = stage.steps
                nets = {"student": student, "teacher": current.requires_grad_(False)}
                job.run_stage(method, stage, nets | method.networks(current, student), index)
                card = {
                    "teacher": source, "method": type(method).__name__, "config": config.resolved(settings),
                    "stage": stage.name, "classes": images.classes, "guidance_baked_in": guidance,
                }  # fmt: skip
                job.export(student, folder, **card)
            current = models.load(folder, device=accelerator.device)
            assert current.steps is not None
            job.measure(stage.name, "student", current, current.steps, folder)
            job.preview(stage.name, current, current.steps)
            job.stage_line(stage)
        job.finish()
    return folder


def _plan(method_list: list[Method], teacher: Denoiser) -> list[tuple[Method, Stage]]:
    """Every stage of every method, checked before anything is trained."""
    plan: list[tuple[Method, Stage]] = []
    start = teacher
    for method in method_list:
        stages = method.stages(start)
        plan += [(method, stage) for stage in stages]
        for stage in stages:
            start = students.read_as(start, stage.prediction)
    names = [stage.name for _, stage in plan]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two stages are called {name}; give the methods step counts that differ")
    return plan


def _teacher(settings: config.Distill, source: str) -> Denoiser:
    teacher = models.load(source)
    null_label = settings.teacher.null_label
    if null_label is not None:
        total = getattr(teacher.network.config, "num_class_embeds", None)
        if total is None or null_label >= total:
            raise UserError(
                f"teacher.null_label {null_label} is no label of this teacher, which has {total or 'none'}"
            )
        teacher.null_label = null_label
        teacher.num_classes = total - 1 if null_label == total - 1 else total
    return teacher


def _fresh(settings: config.Train, images: Images) -> Denoiser:
    """A newly initialised teacher, the same for the same seed."""
    conditional = settings.classes and images.num_classes is not None
    classes = images.num_classes if conditional else None
    null_label = classes if classes is not None and settings.denoising.label_dropout > 0 else None
    total = None if classes is None else classes + (null_label is not None)
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(settings.seed))
        network = settings.model.build(images.shape, total)
    return Denoiser(
        network, settings.schedule.build(), settings.prediction, num_classes=classes, null_label=null_label
    )


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


def _accelerator(settings: config.Train | config.Distill) -> Accelerator:
    AcceleratorState._reset_state()  # a teacher's training before may have had another precision
    return Accelerator(mixed_precision=settings.training.precision)


def _preview_steps(settings: config.Train, denoiser: Denoiser) -> int:
    steps = settings.evaluation.teacher_steps if settings.evaluation else [TEACHER_STEPS]
    return min(max(steps, default=TEACHER_STEPS), denoiser.schedule.num_train_timesteps)


@contextmanager
def _held(settings: config.Train | config.Distill, accelerator: Accelerator) -> Iterator[_Job]:
    """The run folder, held; SIGINT or SIGTERM asks for a checkpoint and a stop, a second stops at once."""
    run = Run(settings.out, config.resolved(settings))
    job = _Job(settings, accelerator, run)

    def stop(number: int, frame: Any) -> None:
        if job.stopping:
            raise KeyboardInterrupt
        job.stopping = True

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)} if _in_main_thread() else {}
    try:
        run.describe(str(accelerator.device))
        yield job
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        run.close()


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


class _Job:
    """One run's parts, and what is done with a model at the end of its stage."""

    images: Images
    console: Console

    def __init__(self, settings: config.Train | config.Distill, accelerator: Accelerator, run: Run) -> None:
        self.settings = settings
        self.accelerator = accelerator
        self.run = run
        self.stopping = False
        self._evaluator: Evaluator | None = None

    def run_stage(self, method: Method, stage: Stage, nets: dict[str, Any], index: int) -> None:
        with self._bar(stage.name, stage.updates) as advance:
            rate = 0.0

            def on_update(done: int, record: dict[str, Any]) -> None:
                nonlocal rate
                rate = record.get("images_per_second", rate)
                text = f"loss {record['loss']:.4f}  {rate:.0f} images/s" if record else ""
                advance(done, text)

            run_stage(
                self.accelerator, method, stage, nets, self.images, self.settings.training, self.run,
                seed=self.settings.seed, stage_index=index, on_update=on_update,
                should_stop=lambda: self.stopping,
            )  # fmt: skip

    def export(self, denoiser: Denoiser, folder: Path, **card: Any) -> None:
        if self.accelerator.is_main_process:
            with new_folder(folder) as temporary:
                models.save(denoiser, temporary)
                cards.write(temporary, cards.describe(denoiser, **card))
        self.accelerator.wait_for_everyone()

    def measure(
        self, name: str, role: str, denoiser: Denoiser, steps: int, folder: Path | None, guidance: float = 1.0
    ) -> None:
        """Appends the model's record to metrics.json and its card, unless it is there already."""
        if (
            self.settings.evaluation is None
            or not self.accelerator.is_main_process
            or self._record(name, steps)
        ):
            return
        if self._evaluator is None:
            self._evaluator = Evaluator(self.settings.evaluation, self.images, self.accelerator.device)
        count = self.settings.evaluation.samples or len(self.images)
        with self._bar(f"FID of {name} in {steps}", count) as advance:
            done = 0

            def on_images(more: int) -> None:
                nonlocal done
                if self.stopping:
                    raise Interrupted
                done += more
                advance(done, "")

            record = self._evaluator(denoiser, steps, guidance=guidance, on_images=on_images)
        record = {"model": name, "role": role, **record}
        write_json(self.run.folder / "metrics.json", [*self.records(), record])
        if folder is not None:
            card = models.card(folder)
            cards.write(folder, {**card, "metrics": [*card.get("metrics", []), record]})

    def records(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = read_json(self.run.folder / "metrics.json", [])
        return found

    def _record(self, name: str, steps: int) -> dict[str, Any] | None:
        return next((r for r in self.records() if r["model"] == name and r["steps"] == steps), None)

    def teacher_curve(self, teacher: Denoiser, student_steps: list[int], guidance: float) -> None:
        """The teacher's FID at its own step counts and at the students', with pictures at most and fewest."""
        evaluation = self.settings.evaluation
        own = evaluation.teacher_steps if evaluation else [TEACHER_STEPS]
        for steps in sorted({*own, *student_steps}, reverse=True):
            self.measure("teacher", "teacher", teacher, steps, None, guidance)
        for steps in sorted({*own, *student_steps}, reverse=True):
            if steps == max(own) or steps <= 4:
                self.preview(f"teacher-{steps}-steps", teacher, steps, guidance)

    def preview(self, name: str, denoiser: Denoiser, steps: int, guidance: float = 1.0) -> None:
        """samples/<name>.png, the same noises and labels for every model."""
        path = self.run.folder / "samples" / f"{name}.png"
        if path.exists() or not self.accelerator.is_main_process:
            return
        options: dict[str, Any] = {} if guidance == 1.0 else {"guidance": guidance}
        batches = generate(denoiser, PREVIEW, steps=steps, batch_size=PREVIEW, **options)
        pictures.save(pictures.grid(np.concatenate([b.cpu().numpy() for b in batches])), path)

    def stage_line(self, stage: Stage) -> None:
        record = self._record(stage.name, stage.steps or 0)
        teacher = [r["fid"] for r in self.records() if r["role"] == "teacher"]
        text = f"{stage.name}: {stage.updates} updates"
        if record:
            text += f", FID {record['fid']:.2f} ({record['fid'] / min(teacher):.2f} of the teacher's best)"
        self.say(text)

    def finish(self) -> None:
        """The report, and what there is to see."""
        if not self.accelerator.is_main_process:
            return
        page = report.write(self.run.folder)
        if self.records():
            self.console.print(_table(self.records()))
            name = self.records()[0]["protocol"]["features"]["name"]
            if name != "inception":
                self.say(f"FID by the features {name!r}: not comparable with FID by Inception features.")
        self.say(f"pictures: {self.run.folder / 'samples'}")
        if page is None:
            self.say("no report: it needs matplotlib (pip install 'diffkd[report]')")
        else:
            self.say(f"report:   {page}")

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def _bar(self, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """A progress bar with rate and time left; silent where the output is no terminal."""
        shown = self.console.is_terminal and self.accelerator.is_main_process
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[text]}"),
        )  # fmt: skip
        with Progress(*columns, console=self.console, disable=not shown, transient=True) as progress:
            task = progress.add_task(title, total=total, text="")
            yield lambda done, text: progress.update(task, completed=done, text=text)


def _table(records: list[dict[str, Any]]) -> Table:
    """FID by steps, teacher and students side by side."""
    table = Table(title="FID by sampling steps")
    for column in ("steps", "nfe", "teacher", "student", "student / teacher's best"):
        table.add_column(column, justify="right")
    teacher = {r["steps"]: r["fid"] for r in records if r["role"] == "teacher"}
    student = {r["steps"]: r["fid"] for r in records if r["role"] == "student"}
    best = min(teacher.values()) if teacher else None
    nfe = {r["steps"]: r["nfe"] for r in records}
    for steps in sorted(teacher.keys() | student.keys(), reverse=True):
        ratio = f"{student[steps] / best:.2f}" if steps in student and best else ""
        cells = [f"{found[steps]:.2f}" if steps in found else "" for found in (teacher, student)]
        table.add_row(str(steps), str(nfe[steps]), *cells, ratio)
    return table
