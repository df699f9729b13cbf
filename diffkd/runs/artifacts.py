"""Export, evaluate, sample and report each model when its stage ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from rich.table import Table

from diffkd.core.denoiser import Denoiser
from diffkd.data.images import Images
from diffkd.errors import Interrupted
from diffkd.generation import grids
from diffkd.generation.drawing import generate
from diffkd.io.files import append_json, new_folder, read_json
from diffkd.io.processes import Processes
from diffkd.methods.base import Stage
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.evaluation.evaluator import Evaluator
from diffkd.metrics.evaluation.image_sets import DataSource
from diffkd.metrics.evaluation.image_stream import ImageStream, cached, identity, sampled_images
from diffkd.metrics.evaluation.reference import Reference
from diffkd.models import loading, sizes
from diffkd.runs import config
from diffkd.runs.reports import model_card, run_report
from diffkd.runs.session import Session

PREVIEW_STEPS = 64  # of a preview of a teacher that is not measured


class RunArtifacts:
    """What is done with a run's models."""

    def __init__(self, session: Session, settings: config.Train | config.Distill, images: Images) -> None:
        self.session, self.settings, self.images = session, settings, images
        self.accelerator, self.run = session.accelerator, session.run
        self.teacher: tuple[Callable[[], Denoiser], float] | None = None  # loaded anew, with its guidance
        self.source = ""  # where it is
        self._evaluator: Evaluator | None = None
        self._teacher: ImageStream | None = None

    def export(self, denoiser: Denoiser, folder: Path, **card: Any) -> None:
        if self.accelerator.is_main_process:
            with new_folder(folder) as temporary:
                loading.save(denoiser, temporary)
                model_card.write(temporary, model_card.describe(denoiser, **card))
                self.run.sync_log()  # the stage is not done again: what it logged must not be lost
        self.accelerator.wait_for_everyone()

    def tell_sizes(self, teacher: Denoiser, student: Denoiser) -> None:
        """Before a stage whose student is smaller, or larger."""
        theirs, ours = sizes.denoiser_size(teacher), sizes.denoiser_size(student)
        if ours != theirs:
            share = ours.parameters / theirs.parameters
            self.session.say(f"student: {ours} ({share:.2f} of the parameters of its teacher: {theirs})")

    def measure(
        self, name: str, role: str, denoiser: Denoiser, steps: int, folder: Path | None, guidance: float = 1.0
    ) -> None:
        """Appends the model's record to metrics.json and its card, unless it is there already.

        All processes measure together. folder: where the model is, None for one of another run.
        """
        if self.settings.evaluation is None:
            return
        known = [self._record(name, steps)]
        broadcast_object_list(known)  # what the main process finds, which writes the file
        record = known[0]
        if record is None:
            size = sizes.denoiser_size(denoiser).recorded()
            record = {"model": name, "role": role, **size, **self._evaluate(name, denoiser, steps, guidance)}
            record["protocol"]["target"] = self._identity(denoiser, folder)
            if self.accelerator.is_main_process:
                append_json(self.run.folder / "metrics.json", record)
        if folder is not None and self.accelerator.is_main_process:
            card = loading.card(folder)
            if record not in card.get("metrics", []):
                model_card.write(folder, {**card, "metrics": [*card.get("metrics", []), record]})

    def _evaluate(self, name: str, denoiser: Denoiser, steps: int, guidance: float) -> dict[str, Any]:
        how = self.settings.evaluation
        assert how is not None
        if self._evaluator is None:
            spec = how.reference or self.settings.data
            reference = Reference(spec, None if how.reference else DataSource(self.images))
            with self.session.bar("features of the reference", reference.count or 0) as advance:
                self._evaluator = Evaluator(
                    how, reference, Processes(self.accelerator.device), self._counted(advance)
                )
        target = sampled_images(denoiser, how, self._evaluator.reference, steps, guidance=guidance)
        teacher = self._teacher_target(how)
        with self.session.bar(f"FID of {name} in {steps}", target.count) as advance:
            return self._evaluator(target, teacher=teacher, on_images=self._counted(advance))

    def _identity(self, denoiser: Denoiser, folder: Path | None) -> dict[str, Any]:
        named = None
        if folder is None and isinstance(self.settings, config.Distill):
            named = self.settings.teacher.null_label
        return identity(denoiser, str(folder or self.source), named)

    def _teacher_target(self, how: Evaluation) -> ImageStream | None:
        """The teacher at its most steps, where students are compared with it image by image."""
        if "agreement" not in how.metrics or self.teacher is None or self._evaluator is None:
            return None
        if self._teacher is not None:
            return self._teacher
        load, guidance = self.teacher
        reference = self._evaluator.reference
        denoiser = load()
        steps = max(self.teacher_steps(denoiser))
        target = sampled_images(denoiser, how, reference, steps, guidance=guidance)
        target.protocol |= self._identity(denoiser, None)
        target.batches = lambda rank, world: sampled_images(
            load(), how, reference, steps, guidance=guidance
        ).batches(rank, world)  # it is in memory only while it is drawn
        self._teacher = cached(target)
        return self._teacher

    def _counted(self, advance: Callable[[int, str], None]) -> Callable[[int], None]:
        """Moves a bar on by so many images, and stops where a stop was asked for."""
        done = 0

        def on_images(more: int) -> None:
            nonlocal done
            if self.session.should_stop():
                raise Interrupted
            done += more * self.accelerator.num_processes
            advance(done, "")

        return on_images

    def records(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = read_json(self.run.folder / "metrics.json", [])
        return found

    def _record(self, name: str, steps: int) -> dict[str, Any] | None:
        return next(
            (
                r
                for r in self.records()
                if (r["model"], r["steps"]) == (name, steps) and r["role"] != "evaluated"
            ),
            None,
        )

    def teacher_steps(self, teacher: Denoiser) -> list[int]:
        """Step counts of a model that has none of its own."""
        evaluation = self.settings.evaluation
        wanted = evaluation.teacher_steps if evaluation and evaluation.teacher_steps else [PREVIEW_STEPS]
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
        grids.save(grids.grid(np.concatenate([b.cpu().numpy() for b in batches])), path)

    def stage_line(self, stage: Stage, steps: int) -> None:
        record = self._record(stage.name, steps)
        teacher = [r["fid"] for r in self.records() if r["role"] == "teacher"]
        text = f"{stage.name}: {stage.updates} updates"
        if record:
            text += f", FID {record['fid']:.2f} ({record['fid'] / min(teacher):.2f} of the teacher's best)"
        self.session.say(text)

    def finish(self) -> None:
        """The report, and what there is to see."""
        if not self.accelerator.is_main_process:
            return
        page = run_report.write(self.run.folder)
        if self.records():
            self.session.console.print(_table(self.records()))
            name = self.records()[0]["protocol"]["features"]["name"]
            if name != "inception":
                self.session.say(
                    f"FID by the features {name!r}: not comparable with FID by Inception features."
                )
        self.session.say(f"pictures: {self.run.folder / 'samples'}")
        if page is None:
            self.session.say("no report: it needs matplotlib (pip install 'diffkd[report]')")
        else:
            self.session.say(f"report:   {page}")


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
