"""`diffkd evaluate --repeat`: measured again from records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from diffkd.errors import UserError
from diffkd.io import progress
from diffkd.io.processes import Processes
from diffkd.io.text import differences
from diffkd.metrics import features
from diffkd.metrics.base import MAIN
from diffkd.metrics.evaluation import image_sets, records
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.evaluation.records import Record
from diffkd.metrics.evaluation.reference import NONE, Reference
from diffkd.metrics.evaluation.targets import AGREEMENT_STEPS, Target, exists, is_model
from diffkd.models.guidance_kind import GuidanceKind, of_options
from diffkd.runs.measurement import Measurement, check_sha256


def repeat(
    path: Path, console: Console, *, device: str | None = None, features_name: str | None = None
) -> bool:
    """Measures again from records alone and says whether the numbers are the same to the last digit.

    features_name: of features of the user's own, which a record may not have loaded. Raises UserError where
    models, images or references are not those that were measured.
    """
    same = True
    open_measurement: tuple[Any, Measurement] | None = None
    for old in records.load(path):
        protocol = old["protocol"]
        target, config, spec = _again(protocol, path)
        if features_name is None:
            features.check_named(config.features, path)
        elif features.locate(features_name) != config.features:
            raise UserError(
                f"{path} is by the features {config.features!r}; leave out --features {features_name}"
            )
        key = (protocol["evaluation"], protocol["reference"]["spec"], protocol["threads"], protocol["device"])
        if open_measurement is None or open_measurement[0] != key:
            torch.set_num_threads(protocol["threads"])
            processes = Processes(device or protocol["device"])
            reference = Reference(spec, cached=False)
            open_measurement = key, Measurement(config, reference, processes, console)
            now = open_measurement[1].evaluator.reference.describe()["sha256"]  # once it was read
            check_sha256(protocol["reference"].get("sha256"), now, protocol["reference"]["name"])
        _, measurement = open_measurement
        network = measurement.evaluator.descriptions[MAIN]["sha256"]
        check_sha256(protocol["features"].get("sha256"), network, "the feature network")
        new = next(measurement.records(target, expected=protocol["target"].get("sha256")))
        if protocol.get("prompts"):
            now = new["protocol"].get("prompts", {}).get("sha256")
            check_sha256(protocol["prompts"].get("sha256"), now, f"{protocol['target'].get('prompts')}")
        _check_worse(protocol, new["protocol"])
        if protocol.get("teacher"):
            teacher = new["protocol"]["teacher"].get("sha256")
            check_sha256(protocol["teacher"].get("sha256"), teacher, "the teacher")
            _check_worse(protocol["teacher"], new["protocol"]["teacher"])
        if measurement.processes.main:
            same = _report(old, new, console) and same
    return same


def _check_worse(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises UserError where the model that guidance led away from is another now."""
    if worse := old.get("guidance_kind", {}).get("worse"):
        now = new["guidance_kind"]["worse"]["sha256"]
        check_sha256(worse.get("sha256"), now, f"the worse model {worse['path']}")


def _report(old: Record, new: Record, console: Console) -> bool:
    """Says of each number whether it is the same, and where one is not, how the protocols differ."""
    same = True
    for key in records.number_keys(old):
        equal = old[key] == new.get(key)
        same = same and equal
        verdict = "the same to the last digit" if equal else f"{new.get(key)!r} now"
        progress.say(console, f"{old['model']} {old.get('steps', '')} {key} {old[key]!r}: {verdict}")
    if not same:
        aside = ("evaluation", "target")
        before, after = ({k: v for k, v in r["protocol"].items() if k not in aside} for r in (old, new))
        for line in differences(before, after):
            progress.say(console, f"  {line}")
    return same


def _opening(where: dict[str, Any]) -> dict[str, str]:
    return {key: where[key] for key in ("variant", "scheduler") if where.get(key) is not None}


def _kind(drawn: dict[str, Any]) -> GuidanceKind | None:
    """Of the guidance that images were drawn with, by their protocol."""
    found = drawn.get("guidance_kind")
    if found is None:
        return None
    return of_options(found.get("interval"), found.get("rescale"), found.get("worse", {}).get("path"))


def _again(protocol: dict[str, Any], path: Path) -> tuple[Target, Evaluation, Any]:
    """What was measured, how, and the reference's spec."""
    target, teacher = protocol["target"], protocol.get("teacher") or {}
    try:
        config = Evaluation.model_validate(protocol["evaluation"])
        given = protocol["reference"]["spec"]
        spec: Any = None if given == NONE else TypeAdapter(image_sets.Spec).validate_python(given)
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        raise UserError(f"{path}: a record's protocol is not understood ({why}); measure again") from error
    there = exists(target["path"]) if target["kind"] == "images" else is_model(target["path"])
    if not there:
        raise UserError(f"{target['path']}, which was measured, does not exist any more; bring it back")
    again = Target(
        target["path"],
        steps=(protocol["steps"],) if "steps" in protocol else (),
        guidance=protocol.get("guidance"),
        guidance_kind=_kind(protocol),
        stock=target["kind"] == "stock",
        resize=target.get("spec", {}).get("resize"),
        teacher=teacher.get("path"),
        teacher_steps=teacher.get("steps", AGREEMENT_STEPS),
        teacher_guidance=teacher.get("guidance"),
        teacher_kind=_kind(teacher),
        null_label=target.get("null_label"),
        quantize=target.get("quantize"),
        prompts=target.get("prompts"),
        opening=_opening(target),
        teacher_opening=_opening(teacher),
    )
    return again, config, spec
