"""Records of measurements: their numbers, and what is checked of a file that anybody may have written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffkd import metrics
from diffkd.errors import UserError
from diffkd.io.config import Positive
from diffkd.io.text import from_json, quoted, read_text, reason
from diffkd.metrics.base import Value
from diffkd.metrics.features.resize import renamed
from diffkd.models.quantization import Quantize

Record = dict[str, Any]
VALUES: dict[str, Value] = {  # by key, in the order of tables
    value.key: value for kind in metrics.kinds().values() for value in kind.values
}
MORE = tuple(key for kind in metrics.kinds().values() for key in kind.more)


def number_keys(record: Mapping[str, Any]) -> list[str]:
    """The keys of a record's numbers."""
    every = [key for value in VALUES.values() for key in (value.key, *value.spread)]
    return [key for key in (*every, *MORE) if key in record]


def formatted(record: Mapping[str, Any]) -> dict[str, str]:
    """The numbers of a record as a table shows them: title -> text. None is an infinite one."""
    found = {}
    for key, title, form, spread in VALUES.values():
        if key in record:
            value = record[key]
            found[title] = "inf" if value is None else f"{value:{form}}"
            beside = [f"{record[name]:{form}}" for name in spread if name in record]
            if len(beside) == 2:
                found[title] += f" [{beside[0]}, {beside[1]}]"
            elif beside:
                found[title] += f" ± {beside[0]}"
    return found


def seconds_per_image(record: Mapping[str, Any]) -> float:
    """Of one process, drawing alone. "seconds" is of the main process, which draws its share."""
    seconds: float = record["seconds"] * record["protocol"]["processes"] / record["protocol"]["samples"]
    return seconds


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
    """What is read of a record's objects, with its types checked: anybody may have written the file."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Features(_Known):
    name: str
    sha256: str | None = None


class _Spec(_Known):
    resize: Positive | None = None


class _Worse(_Known):
    path: str
    sha256: str | None = None


class _GuidanceKind(_Known):
    interval: list[float] | None = Field(None, min_length=2, max_length=2)
    rescale: float = Field(0.0, ge=0, le=1)
    worse: _Worse | None = None


class _Where(_Known):
    path: str
    kind: str = "model"
    sha256: str | None = None
    spec: _Spec = _Spec()
    null_label: int | None = Field(None, ge=0)
    quantize: Quantize | None = None
    prompts: str | None = None
    variant: str | None = None
    scheduler: str | None = None
    steps: Positive | None = None
    guidance: float = Field(1.0, ge=0)
    guidance_kind: _GuidanceKind = _GuidanceKind()


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
    guidance_kind: _GuidanceKind = _GuidanceKind()


class _Record(_Known):
    model: str
    steps: Positive | None = None
    nfe: Positive | None = None
    seconds: float = Field(0, ge=0)
    parameters: Positive | None = None
    macs: int | None = Field(None, ge=0)
    bytes: int | None = Field(None, ge=0)
    notes: list[str] = []
    class_fids: dict[str, float] = {}
    protocol: _Protocol


def check(record: Record, path: Path) -> None:
    """Raises UserError for a record whose values are not of the types that the rest of diffkd expects."""
    try:
        _Record.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        key, message = ".".join(map(str, first["loc"])), first["msg"]
        raise UserError(
            f"{path}: a record's {key} is {quoted(first['input'])} ({message}); it was changed: measure again"
        ) from error
    for key in number_keys(record):
        value = record[key]
        if type(value) not in (int, float) or not abs(value) < 1e300:
            if value is None and key == "psnr":
                continue  # infinite
            raise UserError(
                f"{path}: a record's {key} is {quoted(value)}, which is not a number; it was changed: "
                "measure again"
            )


def load(path: Path) -> list[Record]:
    """The records of a file: one, or a list such as a run's metrics.json.

    Raises UserError for anything else.
    """
    try:
        content = from_json(read_text(path))
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
        for described in (protocol["features"], protocol["reference"].get("features")):
            renamed(described)
    if not records:
        raise UserError(f"{path} holds no record")
    return records
