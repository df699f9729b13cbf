"""`diffkd evaluate`: models and images measured, and measured again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from diffkd import cards, models, tables
from diffkd.base import UserError
from diffkd.config import one_line
from diffkd.metrics import records, sources
from diffkd.metrics.evaluation import Evaluation
from diffkd.metrics.evaluator import Evaluator
from diffkd.metrics.processes import Processes
from diffkd.metrics.records import Record
from diffkd.metrics.reference import Reference
from diffkd.metrics.targets import Target
from diffkd.progress import bar
from diffkd.runs import append_json, differences, write_json
from diffkd.sampling import parse_classes
from diffkd.subjects import TEACHER_STEPS, Subject, is_model, opened, teacher_of


class Work:
    """One evaluation at work: its processes, its console, and what was loaded for it."""

    def __init__(self, console: Console, device: str | None = None) -> None:
        self.console = console
        self.processes = Processes(device)
        self.teachers: dict[Any, Target | None] = {}  # the last one, which may hold its images

    def say(self, text: str) -> None:
        if self.processes.main:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def counted(self, advance: Callable[[int, str], None]) -> Callable[[int], None]:
        done = 0

        def on_images(count: int) -> None:
            nonlocal done
            done += count * self.processes.world
            advance(done, "")

        return on_images

    def evaluator(self, how: Evaluation, reference: Reference) -> Evaluator:
        with bar(self.console, "reference", reference.count or 0, shown=self.processes.main) as advance:
            return Evaluator(how, reference, self.processes, self.counted(advance))

    def measure(self, evaluator: Evaluator, subject: Subject, *, warm_up: bool = False) -> Iterator[Record]:
        """A record for each of the subject's step counts, or of its images.

        warm_up: draws a batch before, so that the first one's cost is not in "seconds".
        """
        place = self.processes.rank, self.processes.world
        given = subject, evaluator.how, evaluator.reference, self.processes.device
        key = subject.teacher, subject.teacher_steps, subject.teacher_guidance, subject.null_label
        for title, target, where, parameters in opened(*given):
            if key not in self.teachers:
                self.teachers = {key: teacher_of(*given)}
            if warm_up:
                next(target.batches(*place), None)
            with bar(self.console, title, target.count, shown=self.processes.main) as advance:
                found = evaluator(target, teacher=self.teachers[key], on_images=self.counted(advance))
            found["protocol"]["target"] = where
            known = {} if parameters is None else {"parameters": parameters}
            yield {"model": Path(subject.path).name or subject.path, "role": "evaluated", **known, **found}


def reference_of(text: str, *, resize: int | None = None, split: str = "train") -> Reference:
    if is_model(text) and Path(text).is_dir():
        raise UserError(f"--reference {text} is a model; give images, or statistics of images")
    return Reference(sources.parse(text, resize=resize, split=split))


def usual_features(reference: Reference) -> str:
    """Where none are named: what a file's statistics are of, digits for digits, else inception."""
    named = reference.protocol.get("features", {}).get("name")
    return str(named) if named else "digits" if reference.name == "digits" else "inception"


def evaluate(
    subject: Subject,
    how: Evaluation,
    reference: Reference,
    console: Console,
    *,
    device: str | None = None,
    out: Path | None = None,
    as_json: bool = False,
) -> list[Record]:
    """Measures, prints, writes: the records, one for each step count."""
    if out is not None and out.is_dir():
        raise UserError(f"--out {out} is a folder; give a file's name in .json")
    work = Work(Console(stderr=True, quiet=True) if as_json else console, device)
    found: list[Record] = []
    evaluator = work.evaluator(how, reference)
    for record in work.measure(evaluator, subject):
        found.append(record)
        if work.processes.main:
            _keep(record)
    if not work.processes.main:
        return found
    if out is not None:
        write_json(out, found[0] if len(found) == 1 else found)
    if as_json:
        print(json.dumps(found[0] if len(found) == 1 else found, indent=2))
        return found
    work.say(f"{subject.path} against {reference.name}")
    console.print(tables.table(found))
    for line in notes(found):
        work.say(line)
    if out is not None:
        work.say(f"records: {out}")
    return found


def notes(found: Sequence[Record]) -> list[str]:
    """What a reader must know of these numbers."""
    record = found[0]
    protocol = record["protocol"]
    name, count = protocol["features"]["name"], protocol["samples"]
    lines = [f"{count:,} images, {name} features, labels: {protocol.get('labels') or 'none'}"]
    if "fid_floor" in record:
        lines.append(
            f"{count:,} images are few: a perfect model would have an FID of about {record['fid_floor']:.3g} "
            "here (expected from the spectrum of the reference's covariance); compare at equal counts only"
        )
    if "fid" in record and name != "inception":
        lines.append(f"FID by the features {name!r} is not comparable with FID by Inception features")
    if protocol["evaluation"]["allow_mismatch"]:
        lines.append("a mismatch of features was allowed: these numbers compare with no others")
    return lines


def _keep(record: Record) -> None:
    """Into the metrics.json of the run and the card of the model, where the model is of a run."""
    folder = Path(record["protocol"]["target"]["path"])
    run = folder.parent.parent if folder.parent.name == "students" else folder.parent
    if record["protocol"]["target"]["kind"] == "images" or not (run / "config.yaml").is_file():
        return
    try:
        append_json(run / "metrics.json", record)
    except (OSError, Timeout) as error:
        raise UserError(
            f"{run / 'metrics.json'} cannot be written ({error}); say --out for the record"
        ) from error
    card = models.card(folder)
    if card:
        cards.write(folder, {**card, "metrics": [*card.get("metrics", []), record]})


def repeat(path: Path, console: Console, *, device: str | None = None) -> bool:
    """Measures again from records alone and says whether the numbers are the same to the last digit."""
    same = True
    for old in records.load(path):
        protocol = old["protocol"]
        subject, how, spec = _again(protocol, path)
        torch.set_num_threads(protocol["threads"])
        work = Work(console, device or protocol["device"])
        reference = Reference(spec)
        evaluator = work.evaluator(how, reference)
        now = next(iter(work.measure(evaluator, subject)))
        for key, where in (("target", "path"), ("reference", "name")):
            before, after = (p[key].get("sha256") for p in (protocol, now["protocol"]))
            if before and after and before != after:
                raise UserError(
                    f"{protocol[key][where]} is not what was measured "
                    f"(sha256 {before[:12]} then, {after[:12]} now)"
                )
        keys = records.keys(old)
        differ = [key for key in keys if old[key] != now.get(key)]
        for key in keys:
            verdict = f"{now.get(key)!r} now" if key in differ else "the same to the last digit"
            work.say(f"{old['model']} {old.get('steps', '')} {key} {old[key]!r}: {verdict}")
        if differ:
            same = False
            for line in _differ(protocol, now["protocol"]):
                work.say(f"  {line}")
    return same


def _again(protocol: dict[str, Any], path: Path) -> tuple[Subject, Evaluation, Any]:
    target, teacher = protocol["target"], protocol.get("teacher") or {}
    try:
        how = Evaluation.model_validate(protocol["evaluation"])
        spec: Any = TypeAdapter(sources.Spec).validate_python(protocol["reference"]["spec"])
    except ValidationError as error:
        raise UserError(
            f"{path}: a record's protocol is not understood ({error.errors()[0]['msg']})"
        ) from error
    subject = Subject(
        target["path"],
        steps=(protocol["steps"],) if "steps" in protocol else (),
        guidance=protocol.get("guidance", 1.0),
        stock=target["kind"] == "stock",
        resize=target.get("spec", {}).get("resize"),
        teacher=teacher.get("path"),
        teacher_steps=teacher.get("steps", TEACHER_STEPS),
        teacher_guidance=teacher.get("guidance", 1.0),
        null_label=target.get("null_label"),
    )
    if target["kind"] == "images" and not Path(subject.path).exists() and subject.path != "digits":
        raise UserError(f"{subject.path}, which was measured, is not there any more; bring it back")
    return subject, how, spec


def _differ(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    keys = ("versions", "commit", "device", "threads", "processes", "batch_size", "dtype")
    return differences({k: before.get(k) for k in keys}, {k: now.get(k) for k in keys})


def parse_steps(text: str | None) -> tuple[int, ...]:
    """Step counts from text such as 1,2,4; none for the model's own."""
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--steps {text!r} is not understood; use step counts such as 1,2,4,8,64")
    return tuple(dict.fromkeys(int(part) for part in parts))


def parse_labels(text: str) -> str | list[int]:
    """data, balanced, or the labels of text such as 0-9."""
    if text in ("data", "balanced"):
        return text
    return parse_classes(text) or "balanced"


def evaluation(**given: Any) -> Evaluation:
    """The config of these options. Raises UserError that names the option."""
    try:
        return Evaluation.model_validate(given)
    except ValidationError as error:
        raise UserError(one_line(error, Evaluation).replace("config key ", "option ")) from error
