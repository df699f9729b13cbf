"""How every plot looks: small figures in a page, drawn in the page's own colours, or pictures beside it."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkd.io.files import new_file
from diffkd.metrics.evaluation.records import seconds_per_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


INSIDE = 5  # lines whose legend has room in a plot
MARKERS = "osD^v*P"  # of the lines in one plot, so that they differ without their colours too

# Plots of a page are drawn in these, and the page's own replace them, in its light and its dark scheme.
COLOURS = {"ink": "#0b0b01", "faint": "#0b0b02", "teacher": "#0b0b03", "student": "#0b0b04"}
INK, FAINT, TEACHER, STUDENT = COLOURS.values()
PLOTS: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "diffkd", "text.parse_math": False, "font.size": 9.5,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.edgecolor": FAINT, "grid.color": FAINT, "figure.facecolor": "none", "axes.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


@contextmanager
def drawing() -> Iterator[None]:
    """Inside, plots are drawn for the page. Raises ImportError without matplotlib."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's settings are for the user's own plots
        matplotlib.rcParams.update(PLOTS)
        yield


def axes(scale: str = "log") -> tuple[Figure, Axes]:
    """Small, so that its text is legible when the plot is as narrow as a phone. scale: of y."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.9, 2.9), layout="constrained")
    plot = figure.add_subplot()
    plot.grid(axis="y", linewidth=0.6)
    plot.tick_params(length=3)
    plot.set_yscale(scale)
    return figure, plot


def svg(figure: Figure, label: str) -> str:
    """The figure as an element of the page, in the page's colours."""
    _plain_ticks(figure.axes[0])
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata=dict.fromkeys(["Date", "Creator", "Format", "Type"]))
    text = stream.getvalue()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])  # the same in every figure, and unused
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


def _plain_ticks(plot: Axes) -> None:
    """Plain numbers on the y axis, also where a narrow range holds no power of ten."""
    from matplotlib.ticker import LogLocator

    axis, (low, high) = plot.yaxis, plot.get_ylim()
    if axis.get_scale() == "log":
        subs = range(1, 10) if high < 6 * low else (1, 2, 5) if high < 200 * low else (1,)
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_minor_formatter("")
    axis.set_major_formatter("{x:g}")


def write_png(path: Path, draw: Callable[[Axes], None], *, width: float = 6, **options: Any) -> bool:
    """A plot as a picture; whether it was written, which takes matplotlib. options: of its axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(width, 4), layout="constrained", dpi=150)
    plot = figure.add_subplot(**options)
    plot.grid(linewidth=0.4)
    draw(plot)
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png")
    return True


def tradeoffs(folder: Path, records: Sequence[Mapping[str, Any]]) -> list[Path]:
    """fid-nfe.png and fid-seconds.png of a benchmark's records; [] without matplotlib or without FID. Of
    several guidance weights they show the one of the least FID."""
    best: dict[str, dict[int, Mapping[str, Any]]] = {}  # by model and steps
    for record in records:
        if record.get("fid", 0) > 0 and record.get("nfe"):
            rows = best.setdefault(record["model"], {})
            rows[record["steps"]] = min(rows.get(record["steps"], record), record, key=lambda r: r["fid"])
    lines = {model: [*rows.values()] for model, rows in best.items()}
    if not lines:
        return []
    written = []
    for name, label, cost in (
        ("fid-nfe", "network evaluations", lambda record: record["nfe"]),
        ("fid-seconds", "seconds per image", seconds_per_image),
    ):
        path, draw = folder / f"{name}.png", partial(_draw_tradeoff, lines=lines, cost=cost)
        options = {"xscale": "log", "yscale": "log", "xlabel": label, "ylabel": "FID"}
        if write_png(path, draw, width=8 if len(lines) > INSIDE else 6, **options):
            written.append(path)
    return written


def _draw_tradeoff(
    plot: Axes, lines: Mapping[str, list[Mapping[str, Any]]], cost: Callable[[Mapping[str, Any]], float]
) -> None:
    """Each model by its name: a line through its step counts, a point without a line where it has one."""
    for i, (title, records) in enumerate(lines.items()):
        points = sorted((cost(record), record["fid"]) for record in records)
        line, marker = "-" if len(points) > 1 else "none", MARKERS[i % len(MARKERS)]
        plot.plot(*zip(*points, strict=True), linestyle=line, marker=marker, markersize=4.5, label=title)
    finish(plot, len(lines))


def finish(plot: Axes, lines: int) -> None:
    """Plain numbers, and a legend: beside the plot where it has more than INSIDE lines."""
    plot.xaxis.set_major_formatter("{x:g}")
    _plain_ticks(plot)
    beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if lines > INSIDE else {}
    for text in plot.legend(frameon=False, fontsize=9, **beside).get_texts():
        text.set_parse_math(False)  # a name is not a formula
