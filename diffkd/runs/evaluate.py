"""`diffkd evaluate`: a model or images measured against a reference."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from filelock import Timeout
from rich.console import Console

from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.io import progress
from diffkd.io.files import append_json, read_json
from diffkd.io.naming import called
from diffkd.io.places import check_writable, expanded
from diffkd.io.processes import Processes, on_device
from diffkd.io.text import from_json, log, quoted, read_text, reason
from diffkd.metrics.evaluation import image_sets, presets
from diffkd.metrics.evaluation.image_sources import ArraySource
from diffkd.metrics.evaluation.in_memory import Given, InMemory, source_of
from diffkd.metrics.evaluation.records import Record, formatted
from diffkd.metrics.evaluation.reference import Reference
from diffkd.metrics.evaluation.targets import exists, is_model
from diffkd.metrics.statistics import Statistics
from diffkd.models import loading
from diffkd.runs.evaluate_options import (
    Measured,
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
    target: str | Path | Denoiser | Given,
    reference: str | Path | Statistics | Given | None = None,
    metrics: str | Sequence[str] = ("fid",),
    *,
    steps: int | Sequence[int] | None = None,
    device: str | None = None,
    out: str | Path | None = None,
    quiet: bool = True,
    **options: Any,
) -> Record | list[Record]:
    """The record of `target` against `reference`, or a list of records for several step counts.

    target: a model (its folder or hub id, or a `Denoiser`), or images: a folder, an .npz, "digits", an array
    or tensor, (N, H, W, C) or (N, C, H, W), uint8 or float in [0, 1], or anything that yields such images, or
    PIL's, one by one or in batches. reference: images likewise, or their statistics (an .npz, or what
    `diffkd.compute_statistics` gave); None where the metrics compare with none ("is"). quiet: False shows
    progress. options: other fields of `diffkd.runs.evaluate_options.Options`, such as samples=10_000 or
    features="inception". A record holds the numbers by name ("fid", ...) and the "protocol", everything that
    they depend on. Raises UserError for whatever cannot be measured.

    >>> import diffkd, numpy
    >>> images = numpy.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=numpy.uint8)
    >>> record = diffkd.evaluate(images, "digits")
    >>> record["fid"] > 100, record["protocol"]["samples"], record["protocol"]["features"]["name"]
    (True, 40, 'digits')
    """
    metrics = [metrics] if isinstance(metrics, str) else metrics
    counts = (steps,) if isinstance(steps, int) else steps
    _check_known(options)
    asked = Options(",".join(metrics), None if counts is None else ",".join(map(str, counts)), **options)
    file = RecordFile(None if out is None else Path(out))
    measured = target if isinstance(target, Denoiser) else _images_or_name(target)
    against = reference if isinstance(reference, Statistics | None) else _images_or_name(reference)
    with on_device(device):
        found = measure(measured, against, asked, Console(quiet=quiet), device=device, file=file)
    if file.failure is not None:
        log.warning("%s", file.failure)  # and not an error, with which the numbers would be lost
    return found[0] if len(found) == 1 else found


def _images_or_name(given: str | Path | Given) -> str | ArraySource:
    return os.fspath(given) if isinstance(given, str | os.PathLike) else source_of(given)


def _check_known(options: Mapping[str, Any]) -> None:
    """Raises UserError for an option that there is not."""
    known = [field.name for field in fields(Options)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise UserError(f"option {quoted(name)} is unknown; did you mean {near}?")


def measure(
    target: Measured,
    reference: str | ArraySource | Statistics | None,
    options: Options,
    console: Console,
    *,
    device: str | None = None,
    file: RecordFile | None = None,
) -> list[Record]:
    """A record for each step count of a model, or one for images: what the command `diffkd evaluate` does.

    target: a model's folder or hub id, a folder of images, an image .npz, or "digits"; or a model that is
    open, or images in memory. reference: images, or statistics of images, or None. file: takes the records
    as they come; whether it could is for the caller to ask. A model inside a run folder, named by its path,
    also gets them into the run's metrics.json and its own card. All processes of a launcher work together;
    only the main one returns records. Raises UserError for whatever cannot be measured; for all that can be
    known without a feature network, before one is used.
    """
    check(target, options)
    named = [*[target] * (isinstance(target, str) and exists(target) and not is_model(target)), reference]
    image_sets.check_used(
        [one for one in named if isinstance(one, str)], resize=options.resize, split=options.split
    )
    if isinstance(options.cache, str):
        check_writable(expanded(options.cache), called("cache"), folder=True)
    size = size_of(options)
    if reference is None:
        check_without_reference(options)
    against = open_reference(
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
    given: str | ArraySource | Statistics | None,
    *,
    resize: int | None = None,
    split: str | None = None,
    cached: bool | str = True,
    as_stored: bool = False,
) -> Reference:
    """What a user gives as the reference, by its name or itself. Raises UserError for a model."""
    if given is None:
        return Reference(None)
    if isinstance(given, Statistics):
        return Reference(InMemory(), statistics=given)
    if isinstance(given, ArraySource):
        return Reference(InMemory(), given, cached=cached)
    if is_model(given) and Path(given).is_dir():
        raise UserError(f"{called('reference')} {given} is a model; give images, or statistics of images")
    spec = image_sets.parse(given, resize=resize, split=split or "train", as_stored=as_stored)
    return Reference(spec, cached=cached)


def _run_of(target: Measured) -> Path | None:
    """The run folder whose metrics.json takes a model's records; None for any other target.

    Raises UserError where that file is not one of diffkd's.
    """
    if not isinstance(target, str) or not is_model(target):
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
