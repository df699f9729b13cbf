"""Records of measurements: what makes two numbers comparable, and what to measure again from one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffkd.errors import UserError
from diffkd.io.config import Positive
from diffkd.io.text import differences, from_json, quoted, reason
from diffkd.models.quantization import Quantize

Record = dict[str, Any]
VALUES = {  # title, format, and the keys of what is shown beside it
    "fid": ("FID", ".3f", "fid_low", "fid_high"), "fd_inf": ("FD-infinity", ".3f"),
    "fd_dino": ("FD-DINOv2", ".2f"), "kid": ("KID", ".5f", "kid_std"), "cmmd": ("CMMD", ".4f"),
    "is": ("Inception Score", ".3f", "is_std"),
    "precision": ("precision", ".3f"), "recall": ("recall", ".3f"),
    "density": ("density", ".3f"), "coverage": ("coverage", ".3f"),
    "psnr": ("PSNR to teacher, dB", ".2f"), "feature_distance": ("feature distance to teacher", ".3f"),
}  # fmt: skip


# What every number depends on beside the model. The rest of a protocol says which model, how it was sampled,
# and on what machine, where numbers differ by rounding alone.
DEFINING = ("samples", "labels")
OF_METRIC = {  # which numbers each metric gives
    "fid": ("fid",), "kid": ("kid",), "is": ("is",), "fd_inf": ("fd_inf",), "fd_dino": ("fd_dino",),
    "prdc": ("precision", "recall", "density", "coverage"), "cmmd": ("cmmd",),
    "agreement": ("psnr", "feature_distance"),
}  # fmt: skip
FEATURES = {"fd_dino": "dinov2", "cmmd": "clip"}  # metrics whose features are not the main ones


def keys(record: Mapping[str, Any]) -> list[str]:
    """The keys of a record's numbers."""
    every = [key for name, (_, _, *more) in VALUES.items() for key in (name, *more)]
    return [key for key in [*every, "fd_inf_slope", "fid_std"] if key in record]


def shown(record: Mapping[str, Any]) -> dict[str, str]:
    """The numbers of a record, for a table: title -> text. A PSNR of None is infinite: JSON has no such."""
    found = {}
    for key, (title, form, *more) in VALUES.items():
        if key in record:
            value = record[key]
            found[title] = "inf" if value is None else f"{value:{form}}"
            beside = [f"{record[name]:{form}}" for name in more if name in record]
            if len(beside) == 2:
                found[title] += f" [{beside[0]}, {beside[1]}]"
            elif beside:
                found[title] += f" ± {beside[0]}"
    return found


def seconds_per_image(record: Mapping[str, Any]) -> float:
    """Of one process, drawing alone. "seconds" is of the main process, which draws its share."""
    seconds: float = record["seconds"] * record["protocol"]["processes"] / record["protocol"]["samples"]
    return seconds


def mismatch(one: Record, two: Record) -> list[str]:
    """Why no number of two records can be compared, each as "key was x, now y"; [] where some can."""
    a, b = one["protocol"], two["protocol"]
    keys = [k for k in DEFINING if k != "labels" or ("labels" in a and "labels" in b)]  # of a folder unknown
    found = differences({k: a.get(k) for k in keys}, {k: b.get(k) for k in keys})
    one_set, other = ({k: p["reference"].get(k) for k in ("sha256", "count")} for p in (a, b))
    found += differences(one_set, other, "reference")
    if found:
        return found
    apart = [line for metric in _shared(a, b) for line in _apart(a, b, metric)]
    return apart if all(_apart(a, b, metric) for metric in _shared(a, b)) else []


def comparable(one: Record, two: Record) -> list[str]:
    """The numbers that two records both have and that mean the same, by the keys of VALUES."""
    a, b = one["protocol"], two["protocol"]
    return [
        key for m in _shared(a, b) if not _apart(a, b, m) for key in OF_METRIC[m] if key in one and key in two
    ]


def _shared(a: Any, b: Any) -> list[str]:
    return [metric for metric in OF_METRIC if metric in a["metrics"] and metric in b["metrics"]]


def _apart(a: Any, b: Any, metric: str) -> list[str]:
    """What a metric's number depends on, where it differs."""
    return differences(_anywhere(_behind(a, metric)), _anywhere(_behind(b, metric)))


def _behind(protocol: Any, metric: str) -> dict[str, Any]:
    key = FEATURES.get(metric)
    used = protocol.get("more_features", {}).get(key) if key else protocol["features"]
    made_with = protocol["reference"].get("features")
    return {
        "features": used,
        "reference.features": used if made_with is None or key else made_with,
        metric: protocol["metrics"][metric],
        "teacher": protocol.get("teacher") if metric == "agreement" else None,
    }


def _anywhere(content: Any) -> Any:
    """Without the places where things were: the same may lie elsewhere."""
    if not isinstance(content, dict):
        return content
    return {k: _anywhere(v) for k, v in content.items() if k not in ("path", "weights")}


NEEDED = (
    "evaluation",
    "reference",
    "target",
    "metrics",
    "features",
    "samples",
    "threads",
    "device",
    "processes",
)


class _Known(BaseModel):
    """What is read of a record's objects: of these types, whoever wrote the file. Other keys may be there."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Features(_Known):
    name: str
    sha256: str | None = None


class _Spec(_Known):
    resize: Positive | None = None


class _Where(_Known):
    path: str
    kind: str = "model"
    sha256: str | None = None
    spec: _Spec = _Spec()
    null_label: int | None = Field(None, ge=0)
    quantize: Quantize | None = None
    steps: Positive | None = None
    guidance: float = Field(1.0, ge=0)


class _Reference(_Known):
    name: str
    spec: dict[str, Any] | str
    count: Positive | None = None
    sha256: str | None = None


class _Protocol(_Known):
    evaluation: dict[str, Any]
    reference: _Reference
    target: _Where
    teacher: _Where | None = None
    metrics: dict[str, Any]
    features: _Features
    more_features: dict[str, Any] = {}
    samples: Positive
    processes: Positive
    threads: int = Field(ge=1, le=4096)
    device: str
    steps: Positive | None = None
    guidance: float = Field(1.0, ge=0)


class _Record(_Known):
    model: str
    steps: Positive | None = None
    nfe: Positive | None = None
    seconds: float = Field(0, ge=0)
    parameters: Positive | None = None
    macs: int | None = Field(None, ge=0)
    bytes: int | None = Field(None, ge=0)
    protocol: _Protocol


def check(record: Record, path: Path) -> None:
    """Raises UserError for a record whose values are not what the rest of the house takes them for."""
    try:
        _Record.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        key, message = ".".join(map(str, first["loc"])), first["msg"]
        raise UserError(
            f"{path}: a record's {key} is {quoted(first['input'])} ({message}); it was changed: measure again"
        ) from error
    for key in keys(record):
        value = record[key]
        if type(value) not in (int, float) or not abs(value) < 1e300:
            if value is None and key == "psnr":
                continue  # infinite
            raise UserError(
                f"{path}: a record's {key} is {quoted(value)}, no number; it was changed: measure again"
            )


def load(path: Path) -> list[Record]:
    """The records of a file: one, or a list such as a run's metrics.json.

    Raises UserError for what is none.
    """
    try:
        content = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as a record ({reason(error)}); give a file of --out"
        ) from error
    records = content if isinstance(content, list) else [content]
    for record in records:
        protocol = record.get("protocol") if isinstance(record, dict) else None
        if not isinstance(protocol, dict) or "model" not in record:
            raise UserError(f"{path} holds no record with a protocol; give a file of --out or metrics.json")
        missing = [key for key in NEEDED if key not in protocol]
        for key, needed in () if missing else (("target", ("kind", "path")), ("reference", ("spec",))):
            inner = protocol[key] if isinstance(protocol[key], dict) else {}
            missing += [f"{key}.{one}" for one in needed if not inner.get(one)]
        if missing:
            raise UserError(
                f"{path}: a record's protocol has no {', '.join(missing)}; it was made by another version "
                "of diffkd, or changed: measure again"
            )
        check(record, path)
    if not records:
        raise UserError(f"{path} holds no record")
    return records
