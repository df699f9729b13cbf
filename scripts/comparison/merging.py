"""Results of seeds that were run at several times or on several machines, as one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffkd.errors import UserError

SAME = ("data", "features", "count", "guidance")
CLOSE = 0.02  # of the teacher's FID: another machine rounds otherwise, and its teacher ends elsewhere


def merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One `results` (comparison/table.py) of several; the teacher's numbers are the first one's.

    Raises UserError where they are not of the same comparison, or share a method's seed.
    """
    first, *others = parts
    for other in others:
        for key in SAME:
            if other[key] != first[key]:
                raise UserError(f"results differ in {key} ({first[key]} and {other[key]}); merge like ones")
        for one, two in zip(first["teacher"], other["teacher"], strict=True):
            for features in first["features"]:
                a, b = (row["of"][features]["fid"][0] for row in (one, two))
                if not math.isclose(a, b, rel_tol=CLOSE):
                    raise UserError(
                        f"results are of different teachers (FID {a:.4g} and {b:.4g} at {one['steps']} steps "
                        f"by {features} features); merge students of one teacher"
                    )
    names = dict.fromkeys(name for part in parts for name in part["methods"])
    return {
        **first,
        "seeds": sorted({seed for part in parts for seed in part["seeds"]}),
        "commit": ", ".join(dict.fromkeys(part["commit"] for part in parts)),
        "methods": {name: _method(name, parts) for name in names},
    }


def _method(name: str, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = [part["methods"][name] for part in parts if name in part["methods"]]
    seeds = [seed for one in found for seed in one["seeds"]]
    if len({*seeds}) < len(seeds):
        raise UserError(f"results of {name} have a seed twice ({sorted(seeds)}); leave one of them out")
    students = [[(row["model"], row["steps"]) for row in one["students"]] for one in found]
    if any(each != students[0] for each in students):
        raise UserError(f"results of {name} are of other students; merge runs of one config")
    rows = [
        {**row, "of": {features: _joined([one["students"][k]["of"][features] for one in found])
                       for features in row["of"]}}
        for k, row in enumerate(found[0]["students"])
    ]  # fmt: skip
    return {
        **found[0], "seeds": seeds, "seconds": [value for one in found for value in one["seconds"]],
        "students": rows,
    }  # fmt: skip


def _joined(values: Sequence[Mapping[str, list[Any]]]) -> dict[str, list[Any]]:
    """Those that all have."""
    return {
        key: [value for one in values for value in one[key]]
        for key in values[0]
        if all(key in one for one in values)
    }
