"""FID against what prompts ask for, over guidance weights: how much of one is paid for the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkd import metrics
from diffkd.metrics.evaluation.records import VALUES
from diffkd.runs.reports import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, Any]
AGAINST = tuple(  # numbers that guidance raises, a plot for each
    value.key for kind in metrics.kinds().values() if kind.with_prompts for value in kind.values
)


def weight(record: Record) -> float:
    """The guidance weight that the model was drawn with; 1 for none."""
    found: float = record["protocol"].get("guidance", 1.0)
    return found


def swept(records: Sequence[Record]) -> bool:
    """Whether a model is there with several guidance weights."""
    rows = [(record["model"], record.get("steps")) for record in records]
    return len({*rows}) < len(rows)


def write(folder: Path, records: Sequence[Record]) -> list[Path]:
    """fid-clip_score.png and the like of a benchmark's records, for each metric of prompts that was measured;
    [] without matplotlib, or without a model of several guidance weights.

    One line a model and step count, its points labelled by the weight; a model of one weight is a point.
    """
    written = []
    for key in AGAINST:
        found = [record for record in records if key in record and record.get("fid", 0) > 0]
        if not swept(found):
            continue
        label = f"{VALUES[key].title} (at the points: guidance weight)"
        path, options = folder / f"fid-{key}.png", {"xlabel": label, "ylabel": "FID"}
        lines = _lines(found)
        draw = partial(_draw, lines=lines, key=key)
        if plots.write_png(path, draw, width=8 if len(lines) > plots.INSIDE else 6, yscale="log", **options):
            written.append(path)
    return written


def _lines(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by the label of their line, in the order of their weights."""
    counts: dict[str, set[int | None]] = {}
    for record in records:
        counts.setdefault(record["model"], set()).add(record.get("steps"))
    lines: dict[str, list[Record]] = {}
    for record in sorted(records, key=weight):
        several = len(counts[record["model"]]) > 1
        label = record["model"] + (f", {record['steps']} steps" if several else "")
        lines.setdefault(label, []).append(record)
    return lines


def _draw(plot: Axes, lines: Mapping[str, Sequence[Record]], key: str) -> None:
    for i, (label, records) in enumerate(lines.items()):
        x, y = [record[key] for record in records], [record["fid"] for record in records]
        line, marker = "-" if len(x) > 1 else "none", plots.MARKERS[i % len(plots.MARKERS)]
        (drawn,) = plot.plot(x, y, linestyle=line, marker=marker, markersize=4.5, label=label)
        for record in records if len(x) > 1 else ():
            plot.annotate(
                f"{weight(record):g}", (record[key], record["fid"]), xytext=(0, -5), ha="center", va="top",
                textcoords="offset points", fontsize=8, color=drawn.get_color(),
            )  # fmt: skip
    plot.margins(x=0.08, y=0.12)
    plots.finish(plot, len(lines))
