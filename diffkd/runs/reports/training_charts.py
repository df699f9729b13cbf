"""The course of training, stage by stage: curves of the log, and their values by noise level."""

from __future__ import annotations

import math
from collections.abc import Collection

from diffkd.errors import printable
from diffkd.runs.reports import page, plots
from diffkd.runs.reports.run_files import Record, Stages, is_finite

LAST = 10  # records of a stage whose mean is its value by noise level
LINES = ("-", "--", ":", "-.")
Curve = list[tuple[float, float]]  # (share of the stage's updates, value)


def section(stages: Stages, spread: Stages | None = None) -> str:
    """spread: the events of the spread watch."""
    cards = []
    for key, title, what in (
        ("loss", "Loss", "What the optimizer minimises."),
        ("gap", "Gap", "Root mean squared distance of the predicted x0 from its target."),
    ):
        scale = _scale(stages, [key])
        curves = [_shares(records, key, _updates(records), scale) for records in stages.values()]
        if any(curves):
            chart = _chart(stages, {"": curves}, f"{title} by stage", scale)
            cards.append(_card(title, what, chart + _heat(stages, f"{key}_by_noise")))
    cards += _of_networks(stages)
    if spread:
        totals = {name: _updates(records) for name, records in stages.items()}
        looks = [_shares(spread.get(name, []), "spread", totals[name], "linear") for name in stages]
        if any(looks):
            what = (
                "Variance of the features of what the student draws, within a class, as a share of the "
                "data’s. Low and falling, it collapses."
            )
            cards.append(_card("Spread", what, _chart(stages, {"": looks}, "Spread by stage", "linear")))
    return f'<section><h2>Training</h2><div class="pair">{"".join(cards)}</div></section>' if cards else ""


def _card(title: str, what: str, content: str) -> str:
    text = page.escaped(what)
    return f'<div class="card"><h3>{page.escaped(title)}</h3><p class="small">{text}</p>{content}</div>'


def _of_networks(stages: Stages) -> list[str]:
    """Where other networks than the student learn too: all their losses, all gradient norms and their ratios
    to the student's, and how often a discriminator is right."""
    keys = dict.fromkeys(key for records in stages.values() for record in records for key in record)
    norms = [key for key in keys if key.endswith("_grad_norm") and key.replace("grad_norm", "loss") in keys]
    names = [key.removesuffix("_grad_norm") for key in norms]
    if not names:
        return []
    cards = []
    for title, what, wanted, linear in (
        ("Losses of the other networks", "Each of its own kind.", {n: f"{n}_loss" for n in names}, False),
        (
            "Gradient norms",
            "Before they are clipped.",
            {"student": "grad_norm", **dict(zip(names, norms, strict=True))},
            False,
        ),
        (
            "Ratios of gradient norms",
            "Each over the student’s. Where one leaves its level, that network runs ahead or falls behind.",
            {n: f"{n}_grad_ratio" for n in names},
            False,
        ),
        (
            "Accuracy of the discriminator",
            "Share of images that it tells right, real and drawn: at 1 it has won, at 0.5 it guesses.",
            {key.removesuffix("_accuracy"): key for key in keys if key.endswith("_accuracy")},
            True,
        ),
    ):
        scale = "linear" if linear else _scale(stages, wanted.values())
        curves = {
            name: [_shares(rs, key, _updates(rs), scale) for rs in stages.values()]
            for name, key in wanted.items()
        }
        if any(map(any, curves.values())):
            cards.append(_card(title, what, _chart(stages, curves, f"{title} by stage", scale)))
    return cards


def _updates(records: list[Record]) -> int:
    updates: int = records[-1].get("updates") or records[-1]["update"]
    return updates


def _scale(stages: Stages, keys: Collection[str]) -> str:
    """Linear where any value is negative, as losses of discriminators and of two scores may be."""
    values = [r[key] for key in keys for records in stages.values() for r in records if key in r]
    return "linear" if any(is_finite(value) and value < 0 for value in values) else "log"


def _shares(records: list[Record], key: str, updates: int, scale: str) -> Curve:
    """The values that a scale can show."""
    shown = [r for r in records if is_finite(r.get(key)) and (scale != "log" or r[key] > 0)]
    return [(r["update"] / (updates or 1), r[key]) for r in shown]


def _chart(stages: Stages, curves: dict[str, list[Curve]], label: str, scale: str = "log") -> str:
    """Stages side by side and equally wide: the last may have ten times the updates of the first. curves: of
    every stage, by name; where there are several names, each has its own kind of line."""
    figure, axes = plots.axes(scale)
    for i in range(1, len(stages)):
        axes.axvline(i, color=plots.FAINT, linewidth=0.6)
    for number, (name, of_stages) in enumerate(curves.items()):
        style = LINES[number % len(LINES)]
        for i, curve in enumerate(of_stages):
            points = [i + u for u, _ in curve], [v for _, v in curve]
            axes.plot(*points, color=plots.STUDENT, linewidth=1.3, linestyle=style)
        if len(curves) > 1:
            shown = printable(name).encode("ascii", "replace").decode()[:20]
            axes.plot([], [], color=plots.STUDENT, linewidth=1.3, linestyle=style, label=shown)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8)
    updates = [_updates(records) for records in stages.values()]
    if len(stages) > 1:
        labels = [_label(name, count) for name, count in zip(stages, updates, strict=True)]
        labelled = range(0, len(labels), -(-len(labels) // 10))  # they must not overlap
        axes.set_xticks([i + 0.5 for i in labelled], [labels[i] for i in labelled])
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel("stage (steps of its student), and its updates")
    else:
        axes.set_xticks([0, 0.5, 1], ["0", f"{updates[0] / 2:g}", str(updates[0])])
        axes.set_xlabel("updates")
    axes.set_xlim(0, len(stages))
    return plots.svg(figure, label)


def _label(stage: str, updates: int) -> str:
    """The steps of a stage's student, its updates, and its method where its name says so: a line each."""
    steps, _, method = printable(stage).encode("ascii", "replace").decode().partition("-steps")
    return "\n".join([steps[:10], str(updates), method.removeprefix("-")[:10]]).rstrip()


def _heat(stages: Stages, key: str) -> str:
    """A table of stages by bins of t, shaded by the logarithm, or by the values where any is negative."""
    means: dict[str, list[float | None]] = {}
    for name, records in stages.items():
        last = [r[key] for r in records[-LAST:] if r.get(key)]
        means[name] = [_mean([v for v in column if is_finite(v)]) for column in zip(*last, strict=False)]
    values = [value for row in means.values() for value in row if value is not None]
    if not values:
        return ""
    shaded = math.log if min(values) >= 0 else float
    depths = [shaded(value) for value in values if value]
    low, span = (min(depths), max(depths) - min(depths) or 1) if depths else (0.0, 1)
    bins = max(map(len, means.values()))
    body = ""
    for name, row in means.items():
        body += f"<tr><td>{page.escaped(name)}</td>"
        for value in row:
            shade = 0.04 + 0.5 * (shaded(value) - low) / span if value else 0
            text = "–" if value is None else f"{value:.2g}"
            body += f'<td style="background:rgb(15 130 120/{shade:.2f})">{text}</td>'
        body += "</tr>"
    head = "".join(f"<th>{b / bins:g}–{(b + 1) / bins:g}</th>" for b in range(bins))
    note = f"By t, from data (0) to noise (1), the mean of a stage’s last {LAST} records. –: no such t."
    table = f"<thead><tr><th>stage</th>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<table class="numbers heat">{table}</table><p class="small">{note}</p>'


def _mean(values: list[float]) -> float | None:
    """None for a bin that no time of the stage lies in."""
    return sum(values) / len(values) if values else None
