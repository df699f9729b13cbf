"""`diffkd evaluate`, `diffkd compare` and `diffkd stats`: models and images measured, and measured again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table
from torch import Tensor

from diffkd import cards, models
from diffkd.base import UserError
from diffkd.config import one_line
from diffkd.denoiser import Denoiser
from diffkd.generation import generate_stock
from diffkd.metrics import features, records, sources
from diffkd.metrics.collect import Collector, Pixels
from diffkd.metrics.evaluation import Evaluation, Evaluator, Target, identity, images_target, model_target
from diffkd.metrics.processes import Processes
from diffkd.metrics.records import Record
from diffkd.metrics.reference import Reference
from diffkd.progress import bar
from diffkd.runs import append_json, commit, differences, versions, write_json
from diffkd.sampling import parse_classes

TEACHER_STEPS = 64  # of the teacher that a student is compared with image by image


@dataclass(frozen=True)
class Subject:
    """What is measured: its name, and for a model the step counts and the guidance it is drawn with."""

    path: str
    steps: tuple[int, ...] = ()
    guidance: float = 1.0
    stock: bool = False  # drawn by the pipeline's own code
    resize: int | None = None  # of a folder of images
    teacher: str | None = None
    teacher_steps: int = TEACHER_STEPS
    teacher_guidance: float = 1.0
    null_label: int | None = None


def is_model(path: str) -> bool:
    """Whether it is a pipeline: a folder with a model_index.json, or what only a hub can have."""
    place = Path(path).expanduser()
    if place.is_dir():
        return (place / "model_index.json").is_file()
    return (
        not place.exists()
        and path.count("/") == 1
        and not path.startswith((".", "/", "~"))
        and not place.suffix
    )


class Work:
    """One evaluation at work: its processes, its console, and what was loaded for it."""

    def __init__(self, console: Console, device: str | None = None) -> None:
        self.console = console
        self.processes = Processes(device)

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

    def measure(self, evaluator: Evaluator, subject: Subject) -> Iterator[Record]:
        """A record for each of the subject's step counts, or of its images."""
        for title, target, teacher, where in self._targets(evaluator, subject):
            with bar(self.console, title, target.count, shown=self.processes.main) as advance:
                found = evaluator(target, teacher=teacher, on_images=self.counted(advance))
            found["protocol"]["target"] = where
            yield {"model": Path(subject.path).name or subject.path, "role": "evaluated", **found}

    def _targets(
        self, evaluator: Evaluator, subject: Subject
    ) -> Iterator[tuple[str, Target, Target | None, dict[str, Any]]]:
        how, reference = evaluator.how, evaluator.reference
        place = Path(subject.path).expanduser()
        path = str(place.resolve()) if place.exists() else subject.path
        if not is_model(subject.path):
            if subject.steps or subject.teacher or subject.guidance != 1:
                raise UserError(
                    f"{subject.path} is a set of images: steps, guidance and teacher are for models"
                )
            spec = sources.parse(subject.path, resize=subject.resize)
            target = images_target(sources.images_of(spec), how.samples, how.batch_size)
            yield (
                subject.path,
                target,
                None,
                {"kind": "images", "path": path, "spec": spec.model_dump(mode="json")},
            )
            return
        if subject.stock:
            pipeline = self._pipeline(subject.path)
            where = {"kind": "stock", "path": path}
            for steps in subject.steps or (None,):
                yield f"{steps or ''} steps", self._stock_target(pipeline, evaluator, steps), None, where
            return
        denoiser = self._load(subject.path, subject.null_label)
        where = identity(denoiser, subject.path, subject.null_label)
        teaching = self._load(subject.teacher, None) if subject.teacher else None
        for steps in subject.steps or self._own_steps(denoiser, subject.path):
            teacher = None
            if teaching is not None and subject.teacher is not None:
                teacher = model_target(
                    teaching, how, reference, subject.teacher_steps, guidance=subject.teacher_guidance
                )
                teacher.protocol |= identity(teaching, subject.teacher)
            target = model_target(denoiser, how, reference, steps, guidance=subject.guidance)
            yield f"{steps} steps", target, teacher, where

    def _load(self, path: str, null_label: int | None) -> Denoiser:
        denoiser = models.load(path, device=self.processes.device)
        if null_label is not None:
            models.name_null_label(denoiser, null_label)
        return denoiser

    def _own_steps(self, denoiser: Denoiser, path: str) -> tuple[int]:
        if denoiser.steps is None:
            raise UserError(f"{path} has no step count of its own (it is no student); say --steps")
        return (denoiser.steps,)

    def _pipeline(self, path: str) -> Any:
        from diffusers import DiffusionPipeline

        try:
            pipeline = DiffusionPipeline.from_pretrained(path, use_safetensors=True)
        except (OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path} cannot be opened as a diffusers pipeline ({reason})") from error
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.processes.device)

    def _stock_target(self, pipeline: Any, evaluator: Evaluator, steps: int | None) -> Target:
        how, reference = evaluator.how, evaluator.reference
        count = how.samples or reference.count or features.USUAL
        network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
        sizes = getattr(network, "config", {})
        classes = sizes.get("num_class_embeds") or sizes.get("num_embeds_ada_norm")
        given: Any = how.labels if isinstance(how.labels, list) else None
        if how.labels == "data":
            given = reference.labels
        labels = None
        if classes:
            every = given if given is not None else range(classes)
            labels = torch.as_tensor([int(label) for label in every])[torch.arange(count) % len(every)]

        def drawn(rank: int, world: int) -> Iterator[tuple[int, Tensor]]:
            images = generate_stock(
                pipeline, count, steps=steps, seed=how.seed, labels=labels, batch_size=how.batch_size,
                share=(rank, world),
            )  # fmt: skip
            for number, batch in enumerate(images):
                yield (rank + number * world) * how.batch_size, batch

        kind = None if labels is None else "balanced" if given is None else how.labels
        made = {"steps": steps} if steps else {}
        return Target(count, drawn, {
            **made, "sampler": "stock", "scheduler": type(pipeline.scheduler).__name__, "labels": kind,
            "seed": how.seed, "dtype": str(pipeline.dtype).removeprefix("torch."),
        })  # fmt: skip


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
    console.print(table(found, f"{subject.path} against {reference.name}"))
    for line in notes(evaluator, found):
        work.say(line)
    if out is not None:
        work.say(f"records: {out}")
    return found


def table(found: Sequence[Record], title: str) -> Table:
    """A column for each record, a row for each number. They share a protocol but for the steps."""
    shown = Table(title=title)
    shown.add_column("steps" if "steps" in found[0] else "")
    for record in found:
        shown.add_column(str(record.get("steps", "")), justify="right")
    values = [records.shown(record) for record in found]
    for name in values[0]:
        shown.add_row(name, *(value[name] for value in values))
    if "nfe" in found[0]:
        shown.add_row("network evaluations", *(str(record["nfe"]) for record in found))
        rates = (r["protocol"]["samples"] / r["seconds"] / r["protocol"]["processes"] for r in found)
        shown.add_row("images/s of a process", *(f"{rate:.0f}" for rate in rates))
    return shown


def notes(evaluator: Evaluator, found: Sequence[Record]) -> list[str]:
    """What a reader must know of these numbers."""
    protocol = found[0]["protocol"]
    name, count = protocol["features"]["name"], protocol["samples"]
    lines = [f"{count:,} images, {name} features, labels: {protocol.get('labels') or 'none'}"]
    if "fid" in found[0]:
        floor = evaluator.few(count)
        if floor is not None:
            lines.append(
                f"{count:,} images are few: a perfect model would have an FID of about {floor:.3g} here "
                "(expected from the spectrum of the reference's covariance); compare at equal counts only"
            )
        if name != "inception":
            lines.append(f"FID by the features {name!r} is not comparable with FID by Inception features")
    if evaluator.how.allow_mismatch:
        lines.append("the reference was made with other features: these numbers compare with no others")
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


def compare(one: Path, two: Path, console: Console) -> bool:
    """Two records side by side; or, where their protocols differ, what differs instead of any number."""
    first, second = records.load(one), records.load(two)
    for a in first:
        for b in second:
            differ = records.mismatch(a, b)
            if differ:
                lines = [f"{one} and {two} cannot be compared:", *(f"  {line}" for line in differ)]
                for line in lines:
                    console.print(line, highlight=False, markup=False, soft_wrap=True)
                return False
    shown = Table(title="the same protocol")
    shown.add_column("")
    found = [(path, record) for path, group in ((one, first), (two, second)) for record in group]
    for path, record in found:
        steps = f", {record['steps']} steps" if "steps" in record else ""
        shown.add_column(f"{path}: {record['model']}{steps}", justify="right")
    values = [records.shown(record) for _, record in found]
    for name in dict.fromkeys(name for value in values for name in value):
        shown.add_row(name, *(value.get(name, "") for value in values))
    console.print(shown)
    return True


def stats(
    text: str,
    out: Path,
    console: Console,
    *,
    features_name: str | None = None,
    weights: str | None = None,
    feature_resize: Any = None,
    dtype: str | None = None,
    resize: int | None = None,
    split: str = "train",
    store: bool = False,
    batch_size: int = 64,
    device: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the statistics of a set of images, with their protocol, to an .npz."""
    if out.suffix != ".npz":
        raise UserError(f"--out {out} is no name for statistics; end it in .npz")
    if out.exists() and not overwrite:
        raise UserError(f"{out} is there already; use another --out, or --overwrite")
    if is_model(text) and Path(text).is_dir():
        raise UserError(f"{text} is a model; give images (diffkd sample draws them)")
    spec = sources.parse(text, resize=resize, split=split)
    source = sources.images_of(spec)
    name = features_name or ("digits" if source.name == "digits" else "inception")
    network = features.load(name, weights=weights, resize=feature_resize, dtype=dtype)
    work = Work(console, device)
    collector = Collector(network.to(work.processes.device), len(source), work.processes.device, store=store)
    pixels = Pixels(len(source))
    with bar(console, f"{name} features of {source.name}", len(source), shown=work.processes.main) as advance:
        counted = work.counted(advance)
        place = work.processes.rank, work.processes.world
        for first, images in sources.batches(source, len(source), batch_size, *place):
            pixels.update(first, images)
            collector.update(first, images.to(work.processes.device))
            counted(len(images))
    collector.merge_across(work.processes.add)
    protocol = {
        "features": features.describe(name, network), "samples": len(source), "name": source.name,
        "spec": spec.model_dump(mode="json"), "sha256": pixels.sha256(work.processes.add),
        "versions": versions(), "commit": commit(),
    }  # fmt: skip
    if work.processes.main:
        collector.statistics.save(
            out, protocol=protocol, labels=source.labels, features=collector.features if store else None
        )
    work.say(f"{len(source):,} images, {name} features: {out}")
    return out


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
