"""The course of training, stage by stage: curves of the log, and their values by noise level."""

from __future__ import annotations

import math

from diffkd.errors import printable
from diffkd.runs.reports import page, plots
from diffkd.runs.reports.run_files import Record, Stages, is_finite, positive

LAST = 10  # records of a stage whose mean is its value by noise level
Curve = list[tuple[float, float]]  # (share of the stage's updates, value)


def section(stages: Stages) -> str:
    cards = ""
    for key, title, what in (
        ("loss", "Loss", "What the optimizer minimises."),
        ("gap", "Gap", "Root mean squared distance of the predicted x0 from its target."),
    ):
        curves = [_curve(records, key) for records in stages.values()]
        if any(curves):
            chart, heat = _chart(stages, curves, f"{title} by stage"), _heat(stages, f"{key}_by_noise")
            cards += f'<div class="card"><h3>{title}</h3><p class="small">{what}</p>{chart}{heat}</div>'
    return f'<section><h2>Training</h2><div class="pair">{cards}</div></section>' if cards else ""


def _updates(records: list[Record]) -> int:
    updates: int = records[-1].get("updates") or records[-1]["update"]
    return updates


def _curve(records: list[Record], key: str) -> Curve:
    total = _updates(records) or 1
    return [(r["update"] / total, r[key]) for r in records if is_finite(r.get(key)) and r[key] > 0]


def _chart(stages: Stages, curves: list[Curve], label: str) -> str:
    """Stages side by side and equally wide: the last may have ten times the updates of the first."""
    figure, axes = plots.axes()
    for i, curve in enumerate(curves):
        if i:
            axes.axvline(i, color=plots.FAINT, linewidth=0.6)
        axes.plot([i + u for u, _ in curve], [v for _, v in curve], color=plots.STUDENT, linewidth=1.3)
    short = (printable(name.removesuffix("-steps")) for name in stages)
    names = [name.encode("ascii", "replace").decode()[:10] for name in short]
    updates = [_updates(records) for records in stages.values()]
    if len(stages) > 1:
        labelled = range(0, len(names), -(-len(names) // 10))  # labels must not overlap
        axes.set_xticks([i + 0.5 for i in labelled], [f"{names[i]}\n{updates[i]}" for i in labelled])
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel("stage (steps of its student), and its updates")
    else:
        axes.set_xticks([0, 0.5, 1], ["0", f"{updates[0] / 2:g}", str(updates[0])])
        axes.set_xlabel("updates")
    axes.set_xlim(0, len(names))
    return plots.svg(figure, label)


def _heat(stages: Stages, key: str) -> str:
    """A table of stages by bins of t, shaded by the logarithm."""
    means: dict[str, list[float | None]] = {}
    for name, records in stages.items():
        last = [r[key] for r in records[-LAST:] if r.get(key)]
        means[name] = [_mean(positive(column)) for column in zip(*last, strict=False)]
    logs = [math.log(value) for row in means.values() for value in row if value]
    if not logs:
        return ""
    bins, low, span = max(map(len, means.values())), min(logs), max(logs) - min(logs) or 1
    body = ""
    for name, row in means.items():
        body += f"<tr><td>{page.escaped(name)}</td>"
        for value in row:
            shade = 0.04 + 0.5 * (math.log(value) - low) / span if value else 0
            text = f"{value:.2g}" if value else "–"
            body += f'<td style="background:rgb(15 130 120/{shade:.2f})">{text}</td>'
        body += "</tr>"
    head = "".join(f"<th>{b / bins:g}–{(b + 1) / bins:g}</th>" for b in range(bins))
    note = f"By t, from data (0) to noise (1), the mean of a stage’s last {LAST} records. –: no such t."
    table = f"<thead><tr><th>stage</th>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<table class="numbers heat">{table}</table><p class="small">{note}</p>'


def _mean(values: list[float]) -> float | None:
    """None for a bin that no time of the stage lies in."""
    return sum(values) / len(values) if values else None
