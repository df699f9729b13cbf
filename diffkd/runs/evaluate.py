"""`diffkd evaluate`: a model or images measured against a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from filelock import Timeout
from pydantic import ValidationError
from rich.console import Console

from diffkd import metrics
from diffkd.errors import UserError
from diffkd.generation.labels import parse_classes
from diffkd.io import progress
from diffkd.io.config import validation_message
from diffkd.io.files import append_json, read_json
from diffkd.io.places import expanded
from diffkd.io.processes import Processes
from diffkd.io.text import from_json, is_number, log, read_text, reason
from diffkd.metrics import features
from diffkd.metrics.evaluation import image_sets
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.evaluation.records import Record, formatted
from diffkd.metrics.evaluation.reference import Reference
from diffkd.metrics.evaluation.targets import AGREEMENT_STEPS, Target, exists, is_model
from diffkd.models import loading
from diffkd.runs.measurement import Measurement
from diffkd.runs.record_file import RecordFile
from diffkd.runs.reports import model_card


@dataclass(frozen=True)
class Options:
    """How `evaluate` measures, a field for each option of the command. None: not given, the default holds."""

    metrics: str = "fid"  # comma-separated
    steps: str | None = None  # comma-separated; default the student's own
    samples: int | None = None
    features: str | None = None
    weights: str | None = None
    feature_resize: str | None = None
    dtype: str | None = None
    resize: int | None = None
    split: str | None = None
    classes: str | None = None
    sampler: str | None = None
    guidance: float | None = None
    null_label: int | None = None
    quantize: str | None = None
    variant: str | None = None
    scheduler: str | None = None
    teacher: str | None = None
    teacher_steps: int | None = None
    teacher_guidance: float | None = None
    bootstrap: int | None = None
    kid_subsets: int | None = None
    kid_subset_size: int | None = None
    is_splits: int | None = None
    dino_weights: str | None = None
    clip_weights: str | None = None
    seed: int | None = None
    batch_size: int | None = None
    allow_mismatch: bool = False
    cache: bool = True  # whether features of the reference are kept between commands

    def given(self) -> list[str]:
        """Names of the options whose values are not the defaults."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]


# Options that mean something for a model only; and the config's names of those that are called otherwise.
OF_MODELS = ("steps", "classes", "sampler", "guidance", "null_label", "quantize", "variant", "scheduler",
             "seed", "teacher", "teacher_steps", "teacher_guidance")  # fmt: skip
KEYS = {"feature_resize": "resize", "classes": "labels", "dino_weights": "dinov2_weights"}
OF_TEACHERS = ("teacher", "teacher_steps", "teacher_guidance")


def evaluate(
    target: str | Path,
    reference: str | Path,
    metrics: Sequence[str] = ("fid",),
    *,
    steps: int | Sequence[int] | None = None,
    device: str | None = None,
    out: Path | None = None,
    **options: Any,
) -> Record | list[Record]:
    """The record of `target` against `reference`, or a list of records for several step counts.

    target: a model's folder or hub id, a folder of images, an image .npz, or "digits". reference: images, or
    statistics of images. options: other fields of `Options`, such as samples=10_000 or features="inception".
    A record holds the numbers by name ("fid", ...) and the "protocol", everything that they depend on. Raises
    UserError for whatever cannot be measured.
    """
    counts = (steps,) if isinstance(steps, int) else steps
    asked = Options(",".join(metrics), None if counts is None else ",".join(map(str, counts)), **options)
    file = RecordFile(out)
    found = measure(str(target), str(reference), asked, Console(quiet=True), device=device, file=file)
    if file.failure is not None:
        log.warning("%s", file.failure)  # and not an error, with which the numbers would be lost
    return found[0] if len(found) == 1 else found


def measure(
    target: str,
    reference: str,
    options: Options,
    console: Console,
    *,
    device: str | None = None,
    file: RecordFile | None = None,
) -> list[Record]:
    """A record for each step count of a model, or one for images: what the command `diffkd evaluate` does.

    target: a model's folder or hub id, a folder of images, an image .npz, or "digits". reference: images, or
    statistics of images. file: takes the records as they come; whether it could is for the caller to ask. A
    model inside a run folder also gets them into the run's metrics.json and its own card. All processes of a
    launcher work together; only the main one returns records. Raises UserError for whatever cannot be
    measured; for all that can be known without a feature network, before one is used.
    """
    _check(target, options)
    against = open_reference(reference, resize=options.resize, split=options.split, cached=options.cache)
    measured, config = target_of(target, options), config_of(options, against)
    run = _run_of(target)
    processes = Processes(device)
    found: list[Record] = []
    for record in Measurement(config, against, processes, console).records(measured):
        if not processes.main:
            continue
        found.append(record)
        try:
            if len(measured.steps) > 1:
                numbers = ", ".join(" ".join(pair) for pair in formatted(record).items())
                progress.say(console, f"{record['steps']} steps: {numbers}")
        finally:  # even where nobody reads any more
            if file is not None:
                file.write(found)
            if run is not None:
                _keep(record, run)
    return found


def _check(target: str, options: Options) -> None:
    """Raises UserError for an option that would do nothing."""
    chosen = [part.strip() for part in options.metrics.split(",")]
    owners = {key: kind.name for kind in metrics.kinds().values() for key in kind.model_fields}
    with_teacher = next(kind.name for kind in metrics.kinds().values() if kind.with_teacher)
    for name in options.given():
        if name in OF_MODELS and not is_model(target) and exists(target):
            raise UserError(f"{option(name)} is for models, and {target} is a set of images; leave it out")
        owner = with_teacher if name in OF_TEACHERS else owners.get(KEYS.get(name, name))
        if owner is not None and owner not in chosen:
            raise UserError(f"{option(name)} is for the metric {owner}; add it to --metrics")


def option(name: str) -> str:
    """As it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def open_reference(
    text: str, *, resize: int | None = None, split: str | None = None, cached: bool = True
) -> Reference:
    """What a user names as the reference. Raises UserError for a model."""
    if is_model(text) and Path(text).is_dir():
        raise UserError(f"--reference {text} is a model; give images, or statistics of images")
    return Reference(image_sets.parse(text, resize=resize, split=split or "train"), cached=cached)


def target_of(path: str, options: Options) -> Target:
    return Target(
        path, steps=parse_steps(options.steps), guidance=_or(options.guidance, 1.0),
        stock=options.sampler == "stock", resize=options.resize, teacher=options.teacher,
        teacher_steps=_or(options.teacher_steps, AGREEMENT_STEPS),
        teacher_guidance=_or(options.teacher_guidance, 1.0), null_label=options.null_label,
        quantize=options.quantize, opening=_given(variant=options.variant, scheduler=options.scheduler),
    )  # fmt: skip


def config_of(options: Options, reference: Reference) -> Evaluation:
    """The config of these options. Raises UserError that names the option."""
    values = {
        "features": features.locate(options.features or default_features(reference)),
        "weights": options.weights,
        "resize": options.feature_resize, "dtype": options.dtype, "samples": options.samples,
        "metrics": [part.strip() for part in options.metrics.split(",")],
        "labels": parse_labels(_or(options.classes, "data")),
        "sampler": None if options.sampler == "stock" else options.sampler,
        "batch_size": _or(options.batch_size, 64), "seed": _or(options.seed, 0),
        "bootstrap": _or(options.bootstrap, 0), "dinov2_weights": options.dino_weights,
        "clip_weights": options.clip_weights, "allow_mismatch": options.allow_mismatch,
    }  # fmt: skip
    keys = ("kid_subsets", "kid_subset_size", "is_splits")
    values |= {key: getattr(options, key) for key in keys if getattr(options, key) is not None}
    try:
        return Evaluation.model_validate(values)
    except ValidationError as error:
        if not error.errors()[0]["loc"]:  # of a value that is wrong in any field
            raise UserError(validation_message(error, Evaluation)) from error
        key = str(error.errors()[0]["loc"][0])
        name = option(next((name for name, other in KEYS.items() if other == key), key))
        line = validation_message(error, Evaluation).partition(" is ")[2]
        raise UserError(f"{name} is {line}{', or stock' * (key == 'sampler')}") from error


def default_features(reference: Reference) -> str:
    """Where none are named: what a file's statistics are of, digits for digits, else inception.

    Raises UserError where they are of features that are not diffkd's own.
    """
    named = reference.protocol.get("features", {}).get("name")
    if named:
        features.check_named(named, reference.name)
    return str(named) if named else "digits" if reference.name == "digits" else "inception"


def parse_steps(text: str | None) -> tuple[int, ...]:
    """Step counts from text such as 1,2,4; none for the model's own."""
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    if not all(is_number(part) and int(part) > 0 for part in parts):
        raise UserError(f"--steps {text!r} is not understood; use step counts such as 1,2,4,8,64")
    return tuple(dict.fromkeys(int(part) for part in parts))


def parse_labels(text: str) -> str | list[int]:
    """data, balanced, or the labels of text such as 0-9."""
    if text in ("data", "balanced"):
        return text
    return parse_classes(text) or "balanced"


def _given(**options: str | None) -> dict[str, str]:
    return {key: value for key, value in options.items() if value is not None}


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


# the run that a model belongs to


def _run_of(target: str) -> Path | None:
    """The run folder whose metrics.json takes a model's records; None for any other target.

    Raises UserError where that file is not one of diffkd's.
    """
    if not is_model(target):
        return None
    folder = expanded(target).resolve()
    run = folder.parent.parent if folder.parent.name == "students" else folder.parent
    if not (run / "config.yaml").is_file():
        return None
    kept = run / "metrics.json"
    if kept.exists():
        try:
            content = from_json(read_text(kept))
        except (OSError, ValueError) as error:
            raise UserError(f"{kept} cannot be read ({reason(error)}); repair it, or move it away") from error
        if not isinstance(content, list) or not all(isinstance(r, dict) for r in content):
            raise UserError(f"{kept} holds no records of diffkd; copy the model out of that folder")
    return run


def _keep(record: Record, run: Path) -> None:
    """Into the metrics.json of the run and the card of the model, once. A failure loses no number."""
    folder = Path(record["protocol"]["target"]["path"])
    try:
        known = read_json(run / "metrics.json", [])
        if record["protocol"] not in [r.get("protocol") for r in known]:
            append_json(run / "metrics.json", record)
            card = loading.card(folder)
            if card:
                model_card.write(folder, {**card, "metrics": [*card.get("metrics", []), record]})
    except (OSError, ValueError, Timeout) as error:
        log.error("%s does not take the record (%s); --out keeps it", run / "metrics.json", error)
