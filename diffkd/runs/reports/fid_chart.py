"""FID against steps, of the teacher and the students: a plot and a table."""

from __future__ import annotations

import math

from diffkd.runs.reports import page, plots, run_files
from diffkd.runs.reports.run_files import Measurements, Record

BESIDE = 6  # columns of a table that has room beside the plot


def section(measured: Measurements) -> str:
    """ "" where nothing was measured."""
    rows = []
    for steps in _all_steps(measured)[::-1]:
        teacher, student = measured.teacher.get(steps), measured.students.get(steps)
        before = [r for r in measured.earlier if r["steps"] == steps]  # of a chain
        rows += [_row(str(r.get("model")), None, r, measured) for r in before]
        rows.append(
            _row(str(student.get("model") if student and before else steps), teacher, student, measured)
        )
    if not rows:
        return ""
    numbers = ["FID", *(value.title for value in run_files.OF_PROMPTS)]
    both = [f"{role} {title}" for title in numbers for role in ("teacher", "student")]
    titles = ["steps", "nfe", *both, "student / teacher’s best", "s per 1000 images"]
    note = "nfe: network evaluations per image. Seconds: the student’s, or the teacher’s where there is none."
    if any("/" in row[1] for row in rows):
        note += " Two nfe: the teacher’s / the student’s."
    filled = [column for column in zip(titles, *rows, strict=True) if set(column[1:]) != {"–"}]
    titles, *rows = (list(row) for row in zip(*filled, strict=True))
    table = f'<div class="card">{page.table(titles, rows, "numbers")}<p class="small">{note}</p></div>'
    chart = ""
    if len(measured.records()) > 1:
        chart = f'<div class="card"><p class="small">FID, lower is better</p>{_chart(measured)}</div>'
    side = "pair" if len(titles) <= BESIDE else "stack"
    return f'<section><h2>FID against steps</h2><div class="{side}">{chart}{table}</div></section>'


def _row(title: str, teacher: Record | None, student: Record | None, measured: Measurements) -> list[str]:
    """Of one step count: its name, nfe, each number of both, the ratio of FIDs, the time."""
    pair = (teacher, student)
    nfe = dict.fromkeys(str(r.get("nfe", "–")) for r in pair if r)
    cells = [page.number(r["fid"] if r else None) for r in pair]
    for value in run_files.OF_PROMPTS:
        cells += [run_files.of_prompts(r).get(value.title, "–") for r in pair]
    ratio, seconds = page.number(measured.ratio(student)), _seconds(student or teacher or {})
    return [title, " / ".join(nfe), *cells, ratio, seconds]


def _all_steps(measured: Measurements) -> list[int]:
    return sorted(measured.teacher.keys() | measured.students.keys())


def _seconds(record: Record) -> str:
    samples, seconds = record.get("protocol", {}).get("samples"), record.get("seconds")
    return page.number(seconds / samples * 1000 if samples and seconds else None)


def _chart(measured: Measurements) -> str:
    figure, axes = plots.axes()
    for records, colour, marker, label in (
        (measured.teacher, plots.TEACHER, "o", "teacher"),
        (measured.students, plots.STUDENT, "s", "students"),
    ):  # fmt: skip
        fids = {steps: r["fid"] for steps, r in records.items() if r["fid"] > 0}  # the axis is logarithmic
        axes.plot(list(fids), list(fids.values()), color=colour, marker=marker, markersize=4.5, label=label)
        above = records is measured.teacher
        for steps, fid in fids.items():
            if above and steps in measured.students and fid < 1.15 * measured.students[steps]["fid"]:
                continue  # the curves meet; the student's value stands for both
            axes.annotate(
                page.number(fid), (steps, fid), xytext=(2, 5) if above else (-4, -6),
                textcoords="offset points",
                ha="left" if above else "center", va="bottom" if above else "top", fontsize=8.5, color=colour,
            )  # fmt: skip
    if before := [(r["steps"], r["fid"]) for r in measured.earlier if r["fid"] > 0]:
        axes.plot(
            *zip(*before, strict=True), "s", color=plots.STUDENT, markerfacecolor="none", markersize=4.5,
            label="of an earlier stage",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.margins(x=0.09, y=0.14)
    every = _all_steps(measured)
    labelled = every[:1]
    for steps in every[1:]:  # labels must not overlap
        width = 0.013 * len(f"{labelled[-1]}{steps}")
        if math.log(steps / labelled[-1]) > width * math.log(every[-1] / every[0]):
            labelled.append(steps)
    axes.set_xticks(labelled, [str(steps) for steps in labelled], fontsize=8.5)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("steps")
    axes.legend(  # above all points
        frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8, handlelength=1.5,
        columnspacing=1,
    )  # fmt: skip
    return plots.svg(figure, "FID against steps, of the teacher and the students")
