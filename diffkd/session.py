"""One run at work: its folder held, its bars, and what is done with a model at the end of a stage."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
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

from diffkd import cards, config, models, pictures, report
from diffkd.data import Images
from diffkd.denoiser import Denoiser
from diffkd.engine import Interrupted, run_stage
from diffkd.generation import generate
from diffkd.method import Method, Stage
from diffkd.metrics import features
from diffkd.metrics.evaluation import Evaluator
from diffkd.runs import Run, new_folder, read_json, write_json

TEACHER_STEPS = 64  # of a preview of a teacher that is not measured


def check(settings: config.Train | config.Distill, accelerator: Accelerator) -> None:
    """Raises UserError for what could only fail later, when there is a run folder already."""
    settings.training.parts(accelerator.num_processes)
    if settings.evaluation is not None:
        features.load(settings.evaluation.features)


@contextmanager
def held(
    settings: config.Train | config.Distill, accelerator: Accelerator, images: Images, console: Console
) -> Iterator[Session]:
    """The run folder, held; SIGINT or SIGTERM asks for a checkpoint and a stop, a second stops at once."""
    check(settings, accelerator)
    run = Run(settings.out, config.resolved(settings), owner=accelerator.is_main_process)
    session = Session(settings, accelerator, run, images, console)

    def stop(number: int, frame: Any) -> None:
        if session.stopping:
            raise KeyboardInterrupt
        session.stopping = True

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)} if _in_main_thread() else {}
    try:
        if accelerator.is_main_process:
            run.describe(str(accelerator.device))
        yield session
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        run.close()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


class Session:
    """One run's parts, and what is done with a model at the end of its stage."""

    def __init__(
        self,
        settings: config.Train | config.Distill,
        accelerator: Accelerator,
        run: Run,
        images: Images,
        console: Console,
    ) -> None:
        self.settings = settings
        self.accelerator = accelerator
        self.run = run
        self.images = images
        self.console = console
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
        if self.settings.evaluation is None or not self.accelerator.is_main_process:
            return
        record = self._record(name, steps)
        if record is None:
            record = {"model": name, "role": role, **self._evaluate(name, denoiser, steps, guidance)}
            write_json(self.run.folder / "metrics.json", [*self.records(), record])
        if folder is not None:
            card = models.card(folder)
            if record not in card.get("metrics", []):
                cards.write(folder, {**card, "metrics": [*card.get("metrics", []), record]})

    def _evaluate(self, name: str, denoiser: Denoiser, steps: int, guidance: float) -> dict[str, Any]:
        assert self.settings.evaluation is not None
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

            return self._evaluator(denoiser, steps, guidance=guidance, on_images=on_images)

    def records(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = read_json(self.run.folder / "metrics.json", [])
        return found

    def _record(self, name: str, steps: int) -> dict[str, Any] | None:
        return next((r for r in self.records() if r["model"] == name and r["steps"] == steps), None)

    def teacher_steps(self, teacher: Denoiser) -> list[int]:
        """Step counts of a model that has none of its own."""
        evaluation = self.settings.evaluation
        wanted = evaluation.teacher_steps if evaluation and evaluation.teacher_steps else [TEACHER_STEPS]
        return [min(steps, teacher.schedule.num_train_timesteps) for steps in wanted]

    def teacher_curve(self, teacher: Denoiser, student_steps: list[int], guidance: float) -> None:
        """The teacher's FID at its own step counts and at the students', with pictures at most and fewest."""
        own = self.teacher_steps(teacher)
        for steps in sorted({*own, *student_steps}, reverse=True):
            self.measure("teacher", "teacher", teacher, steps, None, guidance)
        for steps in sorted({*own, *student_steps}, reverse=True):
            if steps == max(own) or steps <= 4:
                self.preview(f"teacher-{steps}-steps", teacher, steps, guidance)

    def preview(self, name: str, denoiser: Denoiser, steps: int, guidance: float = 1.0) -> None:
        """samples/<name>.png, the same noises and labels for every model."""
        path = self.run.folder / "samples" / f"{name}.png"
        count = self.settings.pictures
        if count == 0 or path.exists() or not self.accelerator.is_main_process:
            return
        options: dict[str, Any] = {} if guidance == 1.0 else {"guidance": guidance}
        batches = generate(denoiser, count, steps=steps, batch_size=64, **options)
        pictures.save(pictures.grid(np.concatenate([b.cpu().numpy() for b in batches])), path)

    def stage_line(self, stage: Stage, steps: int) -> None:
        record = self._record(stage.name, steps)
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
    table = Table(title="FID by sampling steps (nfe: network evaluations)")
    for column in ("steps", "teacher nfe", "FID", "student nfe", "FID", "of the teacher's best"):
        table.add_column(column, justify="right")
    teacher = {r["steps"]: r for r in records if r["role"] == "teacher"}
    student = {r["steps"]: r for r in records if r["role"] == "student"}
    best = min((r["fid"] for r in teacher.values()), default=None)
    for steps in sorted(teacher.keys() | student.keys(), reverse=True):
        cells = []
        for found in (teacher, student):
            record = found.get(steps)
            cells += [str(record["nfe"]), f"{record['fid']:.2f}"] if record else ["", ""]
        ratio = f"{student[steps]['fid'] / best:.2f}" if steps in student and best else ""
        table.add_row(str(steps), *cells, ratio)
    return table
