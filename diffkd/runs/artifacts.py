"""Export, evaluate, sample and report each model when its stage ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list

from diffkd.core import adapters
from diffkd.core.denoiser import Denoiser
from diffkd.data.absent import Unseen
from diffkd.data.images import Images
from diffkd.generation import grids
from diffkd.generation.generator import generate
from diffkd.io.text import counted
from diffkd.methods.base import Stage
from diffkd.metrics.evaluation.image_stream import prompts_for
from diffkd.metrics.evaluation.records import formatted
from diffkd.models import loading, lora_files, saving, sizes
from diffkd.runs import announcement, plans
from diffkd.runs.config import Settings, Teacher
from diffkd.runs.model_evaluator import ModelEvaluator, teacher_steps
from diffkd.runs.reports import card_head, model_card, run_files, run_report, tables, teacher_sampling
from diffkd.runs.session import Session

ROLES, NUMBERS = ("teacher", "student"), ("steps", "nfe", "fid")  # of a run's own records


class RunArtifacts:
    """What a run of denoisers makes of each model beside its weights.

    teacher: of a distillation, with its `path`; guidance: the weight that the teacher is sampled with.
    """

    def __init__(
        self,
        session: Session,
        settings: Settings,
        images: Images | Unseen,
        teacher: Teacher | None = None,
        guidance: float = 1.0,
    ) -> None:
        self.session, self.settings = session, settings
        self.images, self.teacher, self.guidance = images, teacher, guidance
        if session.main:
            session.run.check_records(ROLES, NUMBERS)
        self._evaluate = (
            ModelEvaluator(session, settings, images, teacher, guidance) if settings.evaluation else None
        )

    def export(self, denoiser: Denoiser, folder: Path, **card: Any) -> None:
        """A stock pipeline with its model card. card: more for it to say."""

        def write(place: Path) -> None:
            saving.save(denoiser, place)
            origin = {} if self.teacher is None else card_head.origin(str(self.teacher.path))
            prompts = prompts_for(denoiser, self.images.captions, max(1, self.settings.pictures))
            origin |= card_head.prompt_to_try(prompts or [])
            model_card.write(place, model_card.describe(denoiser, **origin, **card))

        self.session.export(folder, write)

    def announce_size(self, teacher: Denoiser, student: Denoiser, stage: Stage) -> None:
        """Where the student is smaller than its teacher, or larger, or an adapter on it, and whether that is
        to be merged."""
        if student.adapter is not None:
            learns = sum(p.numel() for p in adapters.own(student.network).values())
            whole = sum(p.numel() for p in student.network.parameters()) - learns
            more = stage.interval or plans.adds_guidance(stage, student)
            merged = f", saved merged, as {lora_files.WHY_MERGED}" * more
            self.session.say(
                f"student: an adapter of rank {student.adapter.rank} on {student.adapter.base}, "
                f"{learns / 1e6:.3g} M parameters ({learns / whole:.1%} of those of its teacher){merged}"
            )
            return
        teacher_size, size = sizes.denoiser_size(teacher), sizes.denoiser_size(student)
        if size != teacher_size:
            share = size.parameters / teacher_size.parameters
            self.session.say(
                f"student: {size} ({share:.2f} of the parameters of its teacher: {teacher_size})"
            )

    def measure(
        self, name: str, role: str, denoiser: Denoiser, steps: int, folder: Path, guidance: float = 1.0
    ) -> None:
        """Measures a model of this run, once; its record goes into metrics.json and into its card."""
        record = self._measured(name, role, denoiser, steps, str(folder), guidance=guidance)
        if record is not None and self.session.main:
            card = loading.card(folder)
            best = self._teacher_best() if role == "student" else None
            beside = {} if best is None else {"teacher_measured": best}
            if record not in card.get("metrics", []):
                model_card.write(folder, {**card, **beside, "metrics": [*card.get("metrics", []), record]})

    def announce_measuring(self, teacher: Denoiser) -> None:
        """What will be measured, of the teacher and of the students of a distillation."""
        steps, students = self.teacher_steps(teacher), self.teacher is not None
        self.session.say(
            announcement.measured(self.settings.evaluation, steps, len(self.images), students=students)
        )

    def forecast(self, stages: Sequence[Stage]) -> None:
        """Tells the session's forecast what follows the updates of the first of these stages."""
        self.session.forecast.later = sum(stage.updates for stage in stages[1:])
        students = [student for stage in stages for student in stage.students]
        self.session.forecast.measuring = self._evaluate.seconds(students) if self._evaluate else None

    def teacher_curve(self, denoiser: Denoiser) -> None:
        """The FID of a distillation's teacher at its step counts; pictures at the most and at the fewest."""
        assert self.teacher is not None
        own = self.teacher_steps(denoiser)
        every = sorted({*own}, reverse=True)
        for steps in every:
            self._measured(
                "teacher", "teacher", denoiser, steps, str(self.teacher.path),
                null_label=self.teacher.null_label, guidance=self.guidance,
            )  # fmt: skip
        for steps in every:
            if steps == max(own) or steps <= 4:
                self.preview(f"teacher-{steps}-steps", denoiser, steps, self.guidance)

    def _measured(
        self,
        name: str,
        role: str,
        denoiser: Denoiser,
        steps: int,
        path: str,
        *,
        null_label: int | None = None,
        guidance: float = 1.0,
    ) -> dict[str, Any] | None:
        """The model's record, measured by all processes unless it is known; None without evaluation."""
        if self._evaluate is None:
            return None
        known = [self._record(name, steps)]
        broadcast_object_list(known)  # what the main process sees, which writes the file
        if known[0] is not None:
            return known[0]
        size = sizes.drawn_size(denoiser).recorded()
        values = self._evaluate(name, denoiser, steps, path, null_label=null_label, guidance=guidance)
        denoiser.close()  # it may go on to teach
        record = {"model": name, "role": role, **size, **values}
        numbers = ", ".join(f"{title} {number}" for title, number in formatted(record).items())
        self.session.add_record(record, f"{name} in {counted(steps, 'step')}: {numbers}")
        return record

    def _record(self, name: str, steps: int) -> dict[str, Any] | None:
        """This run's own; `diffkd evaluate` may have added others."""
        for record in self.session.records():
            if (record["model"], record.get("steps")) == (name, steps) and record["role"] in ROLES:
                return record
        return None

    def teacher_steps(self, teacher: Denoiser) -> list[int]:
        """Step counts of a model that has none of its own."""
        return teacher_steps(self.settings.evaluation, teacher)

    def preview(self, name: str, denoiser: Denoiser, steps: int, guidance: float = 1.0) -> None:
        """samples/<name>.png, of the same noises and labels for every model."""
        path = self.session.run.folder / "samples" / f"{name}.png"
        count = self.settings.pictures
        if count == 0 or path.exists() or not self.session.main:
            return
        options: dict[str, Any] = {} if guidance == 1.0 else {"guidance": guidance}
        prompts, drawn = prompts_for(denoiser, self.images.captions, count), []
        with self.session.bar(f"pictures of {name}", count) as advance:
            for batch in generate(denoiser, count, steps=steps, batch_size=64, prompts=prompts, **options):
                drawn.append(batch.cpu().numpy())
                advance(sum(map(len, drawn)), "")
        denoiser.close()
        images = np.concatenate(drawn)
        grids.save(grids.grid(images, prompts), path)
        self.session.told.on_images(self.session.update, name, images)

    def announce_stage(self, stage: Stage, steps: int) -> None:
        text = f"{stage.name}: {stage.updates} updates"
        record, best = self._record(stage.name, steps), self._teacher_best()
        if record:
            ratio = f" ({record['fid'] / best['fid']:.2f} of the teacher's best)" if best else ""
            text += f", FID {record['fid']:.2f}{ratio}"
        self.session.say(text)
        if record and (doubt := teacher_sampling.doubt(record, best)):
            self.session.say(doubt)

    def _teacher_best(self) -> dict[str, Any] | None:
        """Its record of the lowest FID, above 0."""
        measured = [r for r in self.session.records() if r["role"] == "teacher" and r["fid"] > 0]
        return min(measured, key=lambda r: r["fid"], default=None)

    def finish(self) -> None:
        """The report, the table of FIDs, and where to look."""
        if not self.session.main:
            return
        records = [record for record in self.session.records() if record["role"] in ROLES]
        if records:
            self._show(records)
            features = self.settings.evaluation.features if self.settings.evaluation else "inception"
            if features != "inception":
                self.session.say(
                    f"FID by the features {features!r}: not comparable with FID by Inception features."
                )
        samples = self.session.run.folder / "samples"
        if samples.is_dir():
            self.session.say(f"pictures: {samples}")
        self.session.say_report(run_report.write(self.session.run.folder))

    def _show(self, records: list[dict[str, Any]]) -> None:
        """FID by steps, and what is measured of prompts, teacher and students side by side."""
        teacher = {r["steps"]: r for r in records if r["role"] == "teacher"}
        best = self._teacher_best()
        measured = dict.fromkeys(title for r in records for title in run_files.of_prompts(r))

        def cells(record: dict[str, Any] | None) -> list[str]:
            if record is None:
                return [""] * (2 + len(measured))
            found = run_files.of_prompts(record)
            return [str(record["nfe"]), f"{record['fid']:.2f}", *(found.get(title, "") for title in measured)]

        rows = []
        for steps in sorted({r["steps"] for r in records}, reverse=True):
            drawn = [r for r in records if r["role"] == "student" and r["steps"] == steps]
            students: list[dict[str, Any] | None] = [*drawn] or [None]
            for number, student in enumerate(students):  # of a chain, several of the same steps
                both = cells(None if number else teacher.get(steps)) + cells(student)
                ratio = f"{student['fid'] / best['fid']:.2f}" if student and best else ""
                rows.append([str(student["model"]) if student and number else str(steps), *both, ratio])
        self.session.say("FID by sampling steps (nfe: network evaluations)")
        titles = ["steps", "teacher nfe", "FID", *measured, "student nfe", "FID", *measured]
        titles.append("of the teacher's best")
        tables.show(self.session.console, titles, rows)
