"""What a run folder's files say, for its report: whole, half finished or torn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from diffkd import metrics
from diffkd.io.text import from_json
from diffkd.metrics.base import Value

Record = dict[str, Any]
Stages = dict[str, list[Record]]
OF_PROMPTS: tuple[Value, ...] = tuple(  # numbers that say how well images show what their prompts ask for
    value for kind in metrics.kinds().values() if kind.with_prompts for value in kind.values
)


class Measurements(NamedTuple):
    """metrics.json by steps, most first. students: of several of the same steps the last; earlier: the
    others. best: the teacher's record of the lowest FID."""

    teacher: dict[int, Record]
    students: dict[int, Record]
    earlier: list[Record]
    best: Record | None

    def ratio(self, record: Record | None) -> float | None:
        """FID relative to the teacher's best; None where either is unknown."""
        return record["fid"] / self.best["fid"] if record and self.best and self.best["fid"] > 0 else None

    def records(self) -> list[Record]:
        return [*self.teacher.values(), *self.students.values()]


def measurements(path: Path) -> Measurements:
    content = read_json(path)
    records = [r for r in content if isinstance(r, dict)] if isinstance(content, list) else []
    usable = [
        r
        for r in records
        if type(r.get("steps")) is int and r["steps"] > 0 and is_finite(r.get("fid"))
        if isinstance(r.get("protocol", {}), dict)
    ]
    usable.sort(key=lambda r: -r["steps"])
    teacher = {r["steps"]: r for r in usable if r.get("role") == "teacher"}
    students = {r["steps"]: r for r in usable if r.get("role") == "student"}
    earlier = [r for r in usable if r.get("role") == "student" and r is not students[r["steps"]]]
    return Measurements(
        teacher, students, earlier, min(teacher.values(), key=lambda r: r["fid"], default=None)
    )


def of_prompts(record: Record | None) -> dict[str, str]:
    """The numbers of OF_PROMPTS that a record has: title -> text."""
    found = record or {}
    return {
        value.title: f"{found[value.key]:{value.format}}"
        for value in OF_PROMPTS
        if is_finite(found.get(value.key))
    }


def stages(path: Path, event: str | None = None) -> Stages:
    """The log's records by stage, in the order they were made, without events and torn lines; or the events
    of one kind."""
    by_stage: Stages = {}
    for record in map(_parsed, read_text(path).split("\n")):
        if isinstance(record, dict) and record.get("event") == event and {"stage", "update"} <= record.keys():
            by_stage.setdefault(str(record["stage"]), []).append(record)
    return by_stage


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read_json(path: Path) -> Any:
    """None where the file is missing or is not JSON."""
    return _parsed(read_text(path))


def _parsed(text: str) -> Any:
    try:
        return from_json(text)
    except ValueError:
        return None


def is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
