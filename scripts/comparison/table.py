"""What was found, gathered: results.json, and table.md, which is made of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diffkd.runs.reports import markdown

MAIN_STEPS = (1, 2, 4)
MEASURE = "progressive"  # whose cost that of the others is to equal
FORMATS = {"kid": ".4f", "psnr": ".1f"}
MEASURED = ("kid", "precision", "recall", "density", "coverage", "psnr")

# results: {"data", "features", "count", "seeds", "guidance", "commit", "teacher": rows, "methods": by name}
# a row: {"model", "steps", "guidance", "of": {features: {key: one value for each seed}}}
# a method: {"seeds", "seconds": one for each, "passes", "passes_of_an_update", "students": rows}
Row = Mapping[str, Any]


def spread(values: Sequence[float | None], form: str = ".3f") -> str:
    """Mean and sample standard deviation; the value alone where there is one."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    text = f"{statistics.mean(known):{form}}"
    return f"{text} ± {statistics.stdev(known):{form}}" if len(known) > 1 else text


def fid(row: Row, features: str) -> float:
    return statistics.mean(row["of"][features]["fid"])


def best_teacher(results: Mapping[str, Any], guidance: float) -> Row:
    """The teacher at its most steps, which students are compared with."""
    rows = [row for row in results["teacher"] if row["guidance"] == guidance]
    return max(rows, key=lambda row: row["steps"])


def student_at(method: Mapping[str, Any], steps: int) -> Row | None:
    """Of a chain with several students of these steps, the last."""
    rows = [row for row in method["students"] if row["steps"] == steps]
    return rows[-1] if rows else None


def least_steps(method: Mapping[str, Any]) -> Row:
    """The student of the fewest steps, of several the last."""
    return min(reversed(method["students"]), key=lambda row: row["steps"])


def markdown_of(results: Mapping[str, Any]) -> str:
    w, steps = results["guidance"], best_teacher(results, results["guidance"])["steps"]
    compared = f"guided with w = {w:g}, then unguided" if w != 1 else "unguided"
    beside = f", and their ratio to those of {MEASURE}" if MEASURE in results["methods"] else ""
    lines = [
        f"# Every method at one cost: {results['data']}",
        "",
        f"{results['count']:,} images of each model, with the data's labels. Mean and sample standard "
        f"deviation over training seeds {', '.join(map(str, results['seeds']))}; commit {results['commit']}. "
        f"In parentheses the ratio to the teacher at {steps} steps, {compared}. CPU seconds are those of "
        f"training by one thread, drawing of pairs included{beside}; a pass is one of the student's network "
        "over a batch, and a backward pass counts as about two.",
    ]
    for features in results["features"]:
        lines += ["", f"## FID, {features} features", "", *_summary(results, features)]
    for features in results["features"]:
        lines += ["", f"## Every student, {features} features", "", *_details(results, features)]
    return "\n".join(lines) + "\n"


def _summary(results: Mapping[str, Any], features: str) -> Iterable[str]:
    titles = ["method", *(f"{n} step{'s' * (n > 1)}" for n in MAIN_STEPS), "CPU seconds", "passes"]
    rows = []
    for guidance in dict.fromkeys([results["guidance"], 1.0]):
        found = {row["steps"]: row for row in results["teacher"] if row["guidance"] == guidance}
        cells = [_fid(results, found.get(n), features) for n in MAIN_STEPS]
        rows.append([f"teacher, w = {guidance:g}", *cells, "", ""])
    for name, method in results["methods"].items():
        cells = [_fid(results, student_at(method, n), features) for n in MAIN_STEPS]
        cost = [_seconds(results, method), f"{method['passes']:,.0f}"]
        rows.append([_title(results, name), *cells, *cost])
    return markdown.table(titles, rows, "--:")


def _title(results: Mapping[str, Any], name: str) -> str:
    """The method's name, and how many seeds it has where not all are finished."""
    done, wanted = len(results["methods"][name]["seeds"]), len(results["seeds"])
    return name if done == wanted else f"{name} ({done} of {wanted} seeds)"


def _seconds(results: Mapping[str, Any], method: Mapping[str, Any]) -> str:
    text, measure = spread(method["seconds"], ".0f"), results["methods"].get(MEASURE)
    if measure is None:
        return text
    return f"{text} ({statistics.mean(method['seconds']) / statistics.mean(measure['seconds']):.2f})"


def _fid(results: Mapping[str, Any], row: Row | None, features: str) -> str:
    if row is None:
        return ""
    weights = dict.fromkeys([results["guidance"], 1.0])
    ratios = [f"{fid(row, features) / fid(best_teacher(results, w), features):.2f}" for w in weights]
    return f"{spread(row['of'][features]['fid'])} ({', '.join(ratios)})"


def _details(results: Mapping[str, Any], features: str) -> Iterable[str]:
    titles = ["method", "student", "FID", "KID", *MEASURED[1:5], "PSNR to teacher, dB"]
    rows = []
    for row in results["teacher"]:
        rows.append(
            [f"teacher, w = {row['guidance']:g}", f"{row['steps']}-steps", *_cells(results, row, features)]
        )
    for name, method in results["methods"].items():
        rows += [
            [_title(results, name), row["model"], *_cells(results, row, features)]
            for row in method["students"]
        ]
    return markdown.table(titles, rows, "--:")


def _cells(results: Mapping[str, Any], row: Row, features: str) -> list[str]:
    values = row["of"][features]
    return [
        _fid(results, row, features),
        *(spread(values.get(key, []), FORMATS.get(key, ".3f")) for key in MEASURED),
    ]
