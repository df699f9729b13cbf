"""A student far better than its teacher: then the teacher was drawn badly, and the ratio of their FIDs
compares samplers, not models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffkd.core.samplers import SAMPLERS
from diffkd.runs.reports.run_files import is_finite

FAR_BETTER = 0.5  # of the teacher's FID: distillation itself does not halve it
UNSUITED = "renoise"  # for few steps of a student that was trained for it


def doubt(student: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> str:
    """What to say of a student's record beside its teacher's best, "" for nothing."""
    if teacher is None or not (is_finite(student.get("fid")) and is_finite(teacher.get("fid"))):
        return ""
    if not 0 <= student["fid"] < FAR_BETTER * teacher["fid"]:
        return ""
    protocol = teacher.get("protocol")
    used = protocol.get("sampler", "ddim") if isinstance(protocol, dict) else "ddim"
    others = ", ".join(name for name in SAMPLERS if name not in (used, UNSUITED))
    return (
        f"A student so much better than its teacher means that the teacher was drawn badly, by {used} in "
        f"{teacher.get('steps')} steps; measure it by another sampler (diffkd evaluate TEACHER --sampler, "
        f"one of {others}) before comparing the two"
    )
