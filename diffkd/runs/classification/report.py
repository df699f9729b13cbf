"""What a run of classifiers is told as: a table, a learning curve over alpha and T, one page."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffkd.io.files import new_file
from diffkd.runs import config_files
from diffkd.runs.classification.config import Classify
from diffkd.runs.reports import page, plots, run_report
from diffkd.runs.reports.model_card import escaped

Record = dict[str, Any]
TITLES = ("model", "parameters", "MACs", "ms an image", "accuracy, %")
PNG = {"student": "#0c7d74", "teacher": "#6b7787"}  # colours on white, as of the page


class Mean(NamedTuple):
    """Over the seeds, in percent. spread: the sample's standard deviation; 0 of one."""

    mean: float
    spread: float
    of: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" ± {self.spread:.2f}" if self.of > 1 else "")


def mean_of(records: Iterable[Record]) -> Mean:
    found = [100 * record["accuracy"] for record in records]
    return Mean(statistics.mean(found), statistics.stdev(found) if len(found) > 1 else 0.0, len(found))


def table_rows(settings: Classify, records: Sequence[Record]) -> list[list[str]]:
    """Of the teacher, and of each student on labels alone and with the teacher."""
    teaching = config_files.resolved(settings)["method"]
    rows = []
    for model in ("teacher", *settings.students):
        latencies = [
            r["milliseconds"] for r in records if r["model"] == model
        ]  # of one network, whoever taught
        for role, title in (("teacher", ""), ("labels", ", labels alone"), ("distilled", ", distilled")):
            found = [r for r in records if (r["model"], r["role"]) == (model, role)]
            if role == "distilled":
                found = [r for r in found if r["method"] == teaching]
            if found:
                sizes = [_short(found[0]["parameters"]), _short(found[0]["macs"])]
                numbers = [*sizes, f"{statistics.median(latencies):.2f}"]
                rows.append([f"{model}{title}", *numbers, str(mean_of(found))])
    return rows


def _short(count: int) -> str:
    """Three digits: a table has to fit on a phone."""
    power = min(3, (len(str(count)) - 1) // 3)
    return f"{count / 1000**power:.3g}{('', ' k', ' M', ' G')[power]}"


def markdown(rows: Sequence[Sequence[str]], note: str) -> str:
    lines = [f"| {' | '.join(TITLES)} |", "|---" + "|--:" * (len(TITLES) - 1) + "|"]
    lines += [f"| {' | '.join([escaped(row[0]), *row[1:]])} |" for row in rows]
    return "\n".join([*lines, "", note]) + "\n"


# the learning curve


def curves(settings: Classify, records: Sequence[Record]) -> tuple[dict[float, dict[float, Mean]], Mean]:
    """{alpha: {T: accuracy}} of the student of the sweep, and its accuracy on labels alone."""
    assert settings.sweep is not None
    mine = [r for r in records if r["model"] == settings.sweep.student]
    taught = [r for r in mine if r["role"] == "distilled"]
    found = {
        alpha: {
            T: mean_of(
                r for r in taught if (r["method"]["alpha"], r["method"]["temperature"]) == (alpha, T)
            )
            for T in sorted(settings.sweep.temperature)
        }
        for alpha in settings.sweep.alpha
    }  # fmt: skip
    return found, mean_of(r for r in mine if r["role"] == "labels")


def draw(plot: Any, settings: Classify, records: Sequence[Record], colours: dict[str, str]) -> None:
    """Accuracy against temperature, a line for each alpha, bars of the spread; labels alone dashed."""
    found, alone = curves(settings, records)
    for i, (alpha, points) in enumerate(found.items()):
        shade = 0.35 + 0.65 * (i + 1) / len(found)
        plot.errorbar(
            [T * 1.03 ** (i - (len(found) - 1) / 2) for T in points],  # side by side, so that bars are seen
            [m.mean for m in points.values()], yerr=[m.spread for m in points.values()],
            color=colours["student"], alpha=shade, marker=plots.MARKERS[i % len(plots.MARKERS)],
            markersize=4.5, linewidth=1.3, capsize=2, label=f"alpha {alpha:g}",
        )  # fmt: skip
    plot.axhline(alone.mean, color=colours["teacher"], linestyle="--", linewidth=1.3, label="labels alone")
    plot.axhspan(
        alone.mean - alone.spread, alone.mean + alone.spread, color=colours["teacher"], alpha=0.15, lw=0
    )
    every = sorted(settings.sweep.temperature) if settings.sweep else []
    plot.set_xscale("log")
    plot.set_xticks(every, [f"{T:g}" for T in every])
    plot.set_xticks([], minor=True)
    plot.set_xlabel("temperature")


def write_png(path: Path, settings: Classify, records: Sequence[Record]) -> None:
    """Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    assert settings.sweep is not None
    figure = Figure(figsize=(6, 4), layout="constrained", dpi=150)
    plot = figure.add_subplot(ylabel=f"accuracy of {settings.sweep.student}, %")
    plot.grid(linewidth=0.4)
    draw(plot, settings, records, PNG)
    plot.legend(frameon=False)
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png")


def write_page(
    folder: Path, settings: Classify, records: Sequence[Record], rows: Sequence[Sequence[str]], note: str
) -> None:
    """report.html, which stands alone. Raises ImportError without matplotlib."""
    with plots.drawing():
        body = (
            f'<p class="lead">{page.escaped(_lead(settings, records))}</p>'
            f'<section><h2>Accuracy</h2><div class="card">{page.table(TITLES, rows, "numbers models")}'
            f'<p class="small">{page.escaped(note)}</p></div></section>'
        )
        if settings.sweep is not None:
            figure, plot = plots.axes("linear")
            draw(plot, settings, records, plots.COLOURS)
            plot.legend(frameon=False, fontsize=8.5)
            label = f"Accuracy of {settings.sweep.student} against temperature"
            body += (
                f'<section><h2>Alpha and temperature</h2><div class="card"><p class="small">'
                f"{page.escaped(label)}, %. Bars and band: one standard deviation over the seeds.</p>"
                f"{plots.svg(figure, label)}</div></section>"
            )
    body += run_report.details(folder)
    with new_file(folder / "report.html") as temporary:
        temporary.write_text(page.whole(folder.resolve().name, body), encoding="utf-8")


def _lead(settings: Classify, records: Sequence[Record]) -> str:
    """What the teacher was worth, for a reader in a hurry."""
    teaching = config_files.resolved(settings)["method"]
    said = []
    for name in settings.students:
        mine = [r for r in records if r["model"] == name]
        alone = mean_of(r for r in mine if r["role"] == "labels")
        taught = mean_of(r for r in mine if r["role"] == "distilled" and r["method"] == teaching)
        said.append(f"{name}: {alone}% on labels alone, {taught}% distilled")
    return "; ".join(said) + "."
