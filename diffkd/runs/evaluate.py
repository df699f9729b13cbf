"""`diffkd evaluate`: a model or images measured against a reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import Timeout
from rich.console import Console

from diffkd.errors import UserError
from diffkd.io import progress
from diffkd.io.files import append_json, read_json
from diffkd.io.naming import called
from diffkd.io.places import check_writable, expanded
from diffkd.io.processes import Processes
from diffkd.io.text import from_json, log, read_text, reason
from diffkd.metrics.evaluation import image_sets, presets
from diffkd.metrics.evaluation.records import Record, formatted
from diffkd.metrics.evaluation.reference import Reference
from diffkd.metrics.evaluation.targets import is_model
from diffkd.models import loading
from diffkd.runs.evaluate_options import (
    Options,
    check,
    check_without_reference,
    config_of,
    size_of,
    target_of,
)
from diffkd.runs.measurement import Measurement
from diffkd.runs.record_file import RecordFile
from diffkd.runs.reports import model_card


def evaluate(
    target: str | Path,
    reference: str | Path | None = None,
    metrics: Sequence[str] = ("fid",),
    *,
    steps: int | Sequence[int] | None = None,
    device: str | None = None,
    out: Path | None = None,
    **options: Any,
) -> Record | list[Record]:
    """The record of `target` against `reference`, or a list of records for several step counts.

    target: a model's folder or hub id, a folder of images, an image .npz, or "digits". reference: images, or
    statistics of images; None where the metrics compare with none ("is"). options: other fields of `Options`,
    such as samples=10_000 or features="inception". A record holds the numbers by name ("fid", ...) and the
    "protocol", everything that they depend on. Raises UserError for whatever cannot be measured.
    """
    counts = (steps,) if isinstance(steps, int) else steps
    asked = Options(",".join(metrics), None if counts is None else ",".join(map(str, counts)), **options)
    file = RecordFile(out)
    against = None if reference is None else str(reference)
    found = measure(str(target), against, asked, Console(quiet=True), device=device, file=file)
    if file.failure is not None:
        log.warning("%s", file.failure)  # and not an error, with which the numbers would be lost
    return found[0] if len(found) == 1 else found


def measure(
    target: str,
    reference: str | None,
    options: Options,
    console: Console,
    *,
    device: str | None = None,
    file: RecordFile | None = None,
) -> list[Record]:
    """A record for each step count of a model, or one for images: what the command `diffkd evaluate` does.

    target: a model's folder or hub id, a folder of images, an image .npz, or "digits". reference: images, or
    statistics of images, or None. file: takes the records as they come; whether it could is for the caller to
    ask. A model inside a run folder also gets them into the run's metrics.json and its own card. All
    processes of a launcher work together; only the main one returns records. Raises UserError for whatever
    cannot be measured; for all that can be known without a feature network, before one is used.
    """
    check(target, options)
    if isinstance(options.cache, str):
        check_writable(expanded(options.cache), called("cache"), folder=True)
    size = size_of(options)
    if reference is None:
        check_without_reference(options)
    against = Reference(None) if reference is None else open_reference(
        reference, resize=size, split=options.split, cached=options.cache,
        as_stored=presets.as_stored(options.protocol),
    )  # fmt: skip
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


def open_reference(
    text: str,
    *,
    resize: int | None = None,
    split: str | None = None,
    cached: bool | str = True,
    as_stored: bool = False,
) -> Reference:
    """What a user names as the reference. Raises UserError for a model."""
    if is_model(text) and Path(text).is_dir():
        raise UserError(f"--reference {text} is a model; give images, or statistics of images")
    spec = image_sets.parse(text, resize=resize, split=split or "train", as_stored=as_stored)
    return Reference(spec, cached=cached)


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
