"""How a run of classifiers is reported: a table, a learning curve over alpha and temperature, one page."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from diffkd.io.files import new_file
from diffkd.runs.classification.artifacts import ROLES
from diffkd.runs.classification.config import DistillClassifier
from diffkd.runs.method_config import method_config
from diffkd.runs.reports import markdown, page, plots, tables
from diffkd.runs.reports.run_report import details
from diffkd.runs.session import Session

Record = dict[str, Any]
TITLES = ("model", "parameters", "MACs", "ms an image", "accuracy, %")
PNG_COLOURS = {"student": "#0c7d74", "teacher": "#6b7787"}  # on white, as those of the page


def write(session: Session, config: DistillClassifier, held_out: int) -> None:
    """The table on the console, classifier.md and, with matplotlib, sweep.png and report.html.

    held_out: how many images the accuracy is over.
    """
    folder, records = session.run.folder, session.records()
    rows, note = table_rows(config, records), _note(config, held_out, session.accelerator.device.type)
    tables.show(session.console, TITLES, rows)
    session.say(note)
    lines = markdown.table(TITLES, [[markdown.escaped(row[0]), *row[1:]] for row in rows], rule="--:")
    with new_file(folder / "classifier.md") as temporary:
        temporary.write_text("\n".join([*lines, "", note]) + "\n", encoding="utf-8")
    session.say(f"table:  {folder / 'classifier.md'}")
    if config.sweep is not None:
        draw = partial(_draw_sweep, config=config, records=records, colours=PNG_COLOURS)
        if plots.write_png(folder / "sweep.png", draw, ylabel=f"accuracy of {config.sweep.student}, %"):
            session.say(f"sweep:  {folder / 'sweep.png'}")
    session.say_report(page.write(folder, lambda: [*_sections(config, records, rows, note), details(folder)]))


def _note(config: DistillClassifier, held_out: int, device: str) -> str:
    seeds = f"{config.repeats} seed{'s' * (config.repeats > 1)}"
    labels = "all" if config.labelled is None else f"{config.labelled:,}"
    noisy = " at the lowest noise of the schedule" * config.noisy
    return (
        f"Accuracy on {held_out:,} held-out images{noisy}, mean and standard deviation over {seeds}; "
        f"students have {labels} labels. Milliseconds are for one image at a time on {device}."
    )


# accuracy


class Mean(NamedTuple):
    """Over the seeds, in percent. spread: the sample's standard deviation; 0 for one."""

    mean: float
    spread: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" ± {self.spread:.2f}" if self.seeds > 1 else "")


def mean_accuracy(records: Iterable[Record]) -> Mean:
    values = [100 * record["accuracy"] for record in records]
    return Mean(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


def _select(config: DistillClassifier, records: Iterable[Record], model: str, role: str) -> list[Record]:
    """A model's records in that role; distilled ones by the config's own method, not those of the sweep."""
    found = [r for r in records if (r["model"], r["role"]) == (model, role)]
    return [r for r in found if role != "distilled" or r.get("method") == method_config(config.method)]


def table_rows(config: DistillClassifier, records: Sequence[Record]) -> list[list[str]]:
    """Of the teacher, and of each student on labels alone and with the teacher."""
    rows = []
    for model in ("teacher", *config.students):
        # the latency of one network does not depend on its training
        latencies = [r["milliseconds"] for r in records if r["model"] == model and r["role"] in ROLES]
        for role, suffix in (("teacher", ""), ("labels", ", labels alone"), ("distilled", ", distilled")):
            if found := _select(config, records, model, role):
                size = [_short(found[0]["parameters"]), _short(found[0]["macs"])]
                latency = f"{statistics.median(latencies):.2f}"
                rows.append([f"{model}{suffix}", *size, latency, str(mean_accuracy(found))])
    return rows


def _short(count: int) -> str:
    """Three digits: a table has to fit on a phone."""
    power = min(3, (len(str(count)) - 1) // 3)
    return f"{count / 1000**power:.3g}{('', ' k', ' M', ' G')[power]}"


# the learning curve


def _draw_sweep(
    axes: Any, config: DistillClassifier, records: Sequence[Record], colours: dict[str, str]
) -> None:
    """Accuracy against temperature, a line for each alpha, with error bars; labels alone dashed."""
    assert config.sweep is not None
    temperatures, alphas = sorted(config.sweep.temperature), config.sweep.alpha
    student = [r for r in records if r["model"] == config.sweep.student]
    distilled = [r for r in student if r["role"] == "distilled" and isinstance(r.get("method"), dict)]
    for i, alpha in enumerate(alphas):
        means = [
            mean_accuracy(
                r
                for r in distilled
                if (r["method"].get("alpha"), r["method"].get("temperature")) == (alpha, T)
            )
            for T in temperatures
        ]
        axes.errorbar(
            [T * 1.03 ** (i - (len(alphas) - 1) / 2) for T in temperatures],  # side by side, to show the bars
            [m.mean for m in means], yerr=[m.spread for m in means],
            color=colours["student"], alpha=0.35 + 0.65 * (i + 1) / len(alphas),
            marker=plots.MARKERS[i % len(plots.MARKERS)],
            markersize=4.5, linewidth=1.3, capsize=2, label=f"alpha {alpha:g}",
        )  # fmt: skip
    alone = mean_accuracy(r for r in student if r["role"] == "labels")
    low, high = alone.mean - alone.spread, alone.mean + alone.spread
    axes.axhline(alone.mean, color=colours["teacher"], linestyle="--", linewidth=1.3, label="labels alone")
    axes.axhspan(low, high, color=colours["teacher"], alpha=0.15, lw=0)
    axes.set_xscale("log")
    axes.set_xticks(temperatures, [f"{T:g}" for T in temperatures])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("temperature")
    axes.legend(frameon=False, fontsize=8.5)


# the page


def _sections(
    config: DistillClassifier, records: Sequence[Record], rows: Sequence[Sequence[str]], note: str
) -> list[str]:
    summary = "; ".join(
        f"{model}: {mean_accuracy(_select(config, records, model, 'labels'))}% on labels alone, "
        f"{mean_accuracy(_select(config, records, model, 'distilled'))}% distilled"
        for model in config.students
    )
    sections = [
        f'<p class="lead">{page.escaped(summary)}.</p>',
        f'<section><h2>Accuracy</h2><div class="card">{page.table(TITLES, rows, "numbers models")}'
        f'<p class="small">{page.escaped(note)}</p></div></section>',
    ]
    if config.sweep is not None:
        figure, axes = plots.axes("linear")
        _draw_sweep(axes, config, records, plots.COLOURS)
        label = f"Accuracy of {config.sweep.student} against temperature"
        sections.append(
            '<section><h2>Alpha and temperature</h2><div class="card"><p class="small">'
            f"{page.escaped(label)}, %. Bars and band: one standard deviation over the seeds.</p>"
            f"{plots.svg(figure, label)}</div></section>"
        )
    return sections
