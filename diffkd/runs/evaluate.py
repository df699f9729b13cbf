"""`diffkd evaluate`: models and images measured, and measured again."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from filelock import Timeout
from pathlib import Path
from pydantic import TypeAdapter
from pydantic import ValidationError
from rich.console import Console
from typing import Any
import json
import torch
from diffkd.errors import UserError
from diffkd.errors import printable
from diffkd.generation.sample import parse_classes
from diffkd.io.files import append_json
from diffkd.io.files import check_writable
from diffkd.io.files import read_json
from diffkd.io.files import write_json
from diffkd.io.processes import Processes
from diffkd.io.progress import bar
from diffkd.io.text import differences, log
from diffkd.io.text import from_json
from diffkd.io.text import reason
from diffkd.metrics import features
from diffkd.metrics.evaluation import image_sets
from diffkd.metrics.evaluation import records
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.evaluation.evaluator import Evaluator
from diffkd.metrics.evaluation.evaluator import MAIN
from diffkd.metrics.evaluation.image_stream import ImageStream
from diffkd.metrics.evaluation.records import Record
from diffkd.metrics.evaluation.reference import Reference
from diffkd.metrics.evaluation.targets import AGREEMENT_STEPS
from diffkd.metrics.evaluation.targets import Target
from diffkd.metrics.evaluation.targets import exists
from diffkd.metrics.evaluation.targets import is_model
from diffkd.metrics.evaluation.targets import opened
from diffkd.metrics.evaluation.targets import teacher_of
from diffkd.models import loading
from diffkd.io.config import validation_message
from diffkd.runs.reports import model_card
from diffkd.runs.reports import tables




class Work:
    """One evaluation at work: its processes, its console, and what was loaded for it."""

    def __init__(self, console: Console, device: str | None = None) -> None:
        self.console = console
        self.processes = Processes(device)
        self.teachers: dict[Any, ImageStream | None] = {}  # the last one, which may hold its images

    def say(self, text: str) -> None:
        if self.processes.main:
            self.console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

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

    def measure(
        self, evaluator: Evaluator, subject: Target, *, warm_up: bool = False, expected: str | None = None
    ) -> Iterator[Record]:
        """A record for each of the subject's step counts, or of its images.

        warm_up: draws a batch before, so that the first one's cost is not in "seconds". expected: sha256 that
        a model's weights must have.
        """
        place = self.processes.rank, self.processes.world
        given = subject, evaluator.how, evaluator.reference, self.processes.device
        key = subject.teacher, subject.teacher_steps, subject.teacher_guidance, subject.null_label
        for title, target, where, size in opened(*given):
            check_sha256(expected, where.get("sha256"), subject.path)
            if key not in self.teachers:
                self.teachers = {key: teacher_of(*given)}
            with bar(self.console, printable(title), target.count, shown=self.processes.main) as advance:
                try:
                    if warm_up:
                        next(target.batches(*place), None)
                    found = evaluator(target, teacher=self.teachers[key], on_images=self.counted(advance))
                except UserError as error:
                    raise UserError(f"{subject.path}: {error}") from error
            pixels = found["protocol"].pop("pixels", None)
            found["protocol"]["target"] = {**where, **({} if pixels is None else {"sha256": pixels})}
            check_sha256(expected, found["protocol"]["target"].get("sha256"), subject.path)
            name = printable(subject.name or Path(subject.path).name or subject.path)
            yield {"model": name, "role": "evaluated", **size, **found}


def check_sha256(expected: str | None, found: str | None, what: str) -> None:
    """Raises UserError where something is not what was measured."""
    if expected and found and expected != found:
        raise UserError(
            f"{what} is not what was measured (sha256 {expected[:12]} then, {found[:12]} now); "
            "bring back what it was, or measure anew"
        )


def reference_of(text: str, *, resize: int | None = None, split: str = "train") -> Reference:
    if is_model(text) and Path(text).is_dir():
        raise UserError(f"--reference {text} is a model; give images, or statistics of images")
    return Reference(image_sets.parse(text, resize=resize, split=split))


def usual_features(reference: Reference) -> str:
    """Where none are named: what a file's statistics are of, digits for digits, else inception.

    Raises UserError where they are of features that are not diffkd's own.
    """
    named = reference.protocol.get("features", {}).get("name")
    if named:
        features.check_named(named, reference.name)
    return str(named) if named else "digits" if reference.name == "digits" else "inception"


def evaluate(
    subject: Target,
    how: Evaluation,
    reference: Reference,
    console: Console,
    *,
    device: str | None = None,
    out: Path | None = None,
    as_json: bool = False,
) -> list[Record]:
    """Measures, prints, writes: the records, one for each step count."""
    if out is not None:
        check_writable(out, "--out")
    keep = _run_of(subject)
    work = Work(Console(stderr=True, quiet=True) if as_json else console, device)
    found: list[Record] = []
    evaluator = work.evaluator(how, reference)
    for record in work.measure(evaluator, subject):
        found.append(record)
        if work.processes.main:
            if out is not None:
                write_json(out, found[0] if len(found) == 1 else found)
            if keep is not None:
                _keep(record, keep)
    if not work.processes.main:
        return found
    if as_json:
        print(json.dumps(found[0] if len(found) == 1 else found, indent=2))
        return found
    work.say(f"{subject.path} against {reference.name}")
    tables.one_evaluation(console, found)
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
    labels = f", labels: {protocol['labels'] or 'none'}" if "labels" in protocol else ""
    lines = [f"{count:,} images, {name} features{labels}"]
    if "fid_floor" in record:
        lines.append(
            f"{count:,} images are few: fresh data would have an FID of about {record['fid_floor']:.3g} "
            "here (expected from the spectrum of the reference's covariance); compare at equal counts only"
        )
    if "fid" in record and name != "inception":
        lines.append(f"FID by the features {name!r} is not comparable with FID by Inception features")
    if protocol["evaluation"]["allow_mismatch"]:
        lines.append("a mismatch of features was allowed: these numbers compare with no others")
    return lines


def _run_of(subject: Target) -> Path | None:
    """The run that a model is of, whose metrics.json takes its records. UserError where that is not ours."""
    if not is_model(subject.path):
        return None
    folder = Path(subject.path).expanduser().resolve()
    run = folder.parent.parent if folder.parent.name == "students" else folder.parent
    if not (run / "config.yaml").is_file():
        return None
    kept = run / "metrics.json"
    if kept.exists():
        try:
            content = from_json(kept.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{kept} cannot be read ({reason(error)}); repair it, or move it away") from error
        if not isinstance(content, list) or not all(isinstance(r, dict) for r in content):
            raise UserError(f"{kept} holds no records of diffkd; copy the model out of that folder")
    return run


def _keep(record: Record, run: Path) -> None:
    """Into the metrics.json of the run and the card of the model, once. The numbers are not lost without."""
    folder = Path(record["protocol"]["target"]["path"])
    try:
        known = read_json(run / "metrics.json", [])
        if record["protocol"] not in [r.get("protocol") for r in known]:
            append_json(run / "metrics.json", record)
            card = loading.card(folder)
            if card:
                model_card.write(folder, {**card, "metrics": [*card.get("metrics", []), record]})
    except (OSError, Timeout) as error:
        log.warning("%s does not take the record (%s); --out keeps it", run / "metrics.json", error)


def repeat(
    path: Path, console: Console, *, device: str | None = None, features_name: str | None = None
) -> bool:
    """Measures again from records alone and says whether the numbers are the same to the last digit.

    features_name: of features of the user's own, which a record may not have loaded. Raises UserError where
    models, images or references are not those that were measured.
    """
    same = True
    held: tuple[Any, Work, Evaluator] | None = None
    for old in records.load(path):
        protocol = old["protocol"]
        subject, how, spec = _again(protocol, path)
        if features_name is None:
            features.check_named(how.features, path)
        elif features_name != how.features:
            raise UserError(
                f"{path} is by the features {how.features!r}; leave out --features {features_name}"
            )
        key = (protocol["evaluation"], protocol["reference"]["spec"], protocol["threads"], protocol["device"])
        if held is None or held[0] != key:
            torch.set_num_threads(protocol["threads"])
            work = Work(console, device or protocol["device"])
            evaluator = work.evaluator(how, Reference(spec))
            now = evaluator.reference.describe()["sha256"]
            check_sha256(protocol["reference"].get("sha256"), now, protocol["reference"]["name"])
            held = key, work, evaluator
        _, work, evaluator = held
        check_sha256(
            protocol["features"].get("sha256"), evaluator.descriptions[MAIN]["sha256"], "the feature network"
        )
        found = next(iter(work.measure(evaluator, subject, expected=protocol["target"].get("sha256"))))
        if protocol.get("teacher"):
            check_sha256(
                protocol["teacher"].get("sha256"), found["protocol"]["teacher"].get("sha256"), "the teacher"
            )
        same = _report(old, found, work) and same
    return same


def _report(old: Record, now: Record, work: Work) -> bool:
    same = True
    for key in records.keys(old):
        equal = old[key] == now.get(key)
        same = same and equal
        verdict = "the same to the last digit" if equal else f"{now.get(key)!r} now"
        work.say(f"{old['model']} {old.get('steps', '')} {key} {old[key]!r}: {verdict}")
    if not same:
        aside = ("evaluation", "target")
        before, after = ({k: v for k, v in r["protocol"].items() if k not in aside} for r in (old, now))
        for line in differences(before, after):
            work.say(f"  {line}")
    return same


def _again(protocol: dict[str, Any], path: Path) -> tuple[Target, Evaluation, Any]:
    target, teacher = protocol["target"], protocol.get("teacher") or {}
    try:
        how = Evaluation.model_validate(protocol["evaluation"])
        spec: Any = TypeAdapter(image_sets.Spec).validate_python(protocol["reference"]["spec"])
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        raise UserError(f"{path}: a record's protocol is not understood ({why}); measure again") from error
    if not is_model(target["path"]) and target["kind"] != "images":
        raise UserError(f"{target['path']}, which was measured, is not there any more; bring it back")
    if target["kind"] == "images" and not exists(target["path"]):
        raise UserError(f"{target['path']}, which was measured, is not there any more; bring it back")
    subject = Target(
        target["path"],
        steps=(protocol["steps"],) if "steps" in protocol else (),
        guidance=protocol.get("guidance", 1.0),
        stock=target["kind"] == "stock",
        resize=target.get("spec", {}).get("resize"),
        teacher=teacher.get("path"),
        teacher_steps=teacher.get("steps", AGREEMENT_STEPS),
        teacher_guidance=teacher.get("guidance", 1.0),
        null_label=target.get("null_label"),
        quantize=target.get("quantize"),
    )
    return subject, how, spec


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
    options = {"resize": "feature-resize", "labels": "classes", "dinov2_weights": "dino-weights"}
    try:
        return Evaluation.model_validate(given)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        option = options.get(key, key.replace("_", "-"))
        line = validation_message(error, Evaluation).partition(" is ")[2]
        more = ", or stock" if key == "sampler" else ""
        raise UserError(f"--{option} is {line}{more}") from error
