"""FID against steps, of the teacher and the students: a plot and a table."""

from __future__ import annotations

import math

from diffkd.runs.reports import page, plots
from diffkd.runs.reports.run_files import Measurements, Record


def section(measured: Measurements) -> str:
    """ "" where nothing was measured."""
    rows = []
    for steps in _all_steps(measured)[::-1]:
        teacher, student = measured.teacher.get(steps), measured.students.get(steps)
        nfe = dict.fromkeys(str(r.get("nfe", "–")) for r in (teacher, student) if r)
        fids = [page.number(r["fid"] if r else None) for r in (teacher, student)]
        more = [page.number(measured.ratio(student)), _seconds(student or teacher or {})]
        before = [r for r in measured.earlier if r["steps"] == steps]  # of a chain
        for r in before:
            numbers = [page.number(value) for value in (r["fid"], measured.ratio(r))]
            rows.append([str(r.get("model")), str(r.get("nfe", "–")), "–", *numbers, _seconds(r)])
        title = student.get("model") if student and before else steps
        rows.append([str(title), " / ".join(nfe), *fids, *more])
    if not rows:
        return ""
    titles = ["steps", "nfe", "teacher FID", "student FID", "student / teacher’s best", "s per 1000 images"]
    note = "nfe: network evaluations per image. Seconds: the student’s, or the teacher’s where there is none."
    if any("/" in row[1] for row in rows):
        note += " Two nfe: the teacher’s / the student’s."
    filled = [column for column in zip(titles, *rows, strict=True) if set(column[1:]) != {"–"}]
    titles, *rows = (list(row) for row in zip(*filled, strict=True))
    table = f'<div class="card">{page.table(titles, rows, "numbers")}<p class="small">{note}</p></div>'
    chart = ""
    if len(measured.records()) > 1:
        chart = f'<div class="card"><p class="small">FID, lower is better</p>{_chart(measured)}</div>'
    return f'<section><h2>FID against steps</h2><div class="pair">{chart}{table}</div></section>'


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
    axes.legend(frameon=False, loc="upper right")
    return plots.svg(figure, "FID against steps, of the teacher and the students")
