"""`diffkd benchmark`: models x steps x metrics, one row at a time, into one table and two plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from rich.console import Console
import html
from diffkd.errors import printable
from diffkd.io.files import append_json
from diffkd.io.files import new_file
from diffkd.metrics.evaluation import records
from diffkd.metrics.evaluation.evaluator import require
from diffkd.metrics.evaluation.records import Record
from diffkd.metrics.evaluation.reference import Reference
from diffkd.metrics.evaluation.targets import AGREEMENT_STEPS
from diffkd.metrics.evaluation.targets import Target
from diffkd.metrics.evaluation.targets import opened
from diffkd.metrics.evaluation.targets import teacher_of
from diffkd.runs import config
from diffkd.runs import config_files
from diffkd.runs.evaluate import Work
from diffkd.runs.reports import plots
from diffkd.runs.reports import tables
from diffkd.training.run_folder import RunFolder


def run(settings: config.Benchmark, console: Console) -> Path:
    """Measures every row that metrics.json does not hold yet; the benchmark's folder."""
    work = Work(console)
    place = settings.out / "metrics.json"
    wanted = _wanted(settings, _rows(place))
    if wanted:
        _check(settings, wanted, work)
    folder = RunFolder(settings.out, config_files.resolved(settings), owner=work.processes.main)
    try:
        if work.processes.main:
            folder.describe(str(work.processes.device), work.processes.world)
        _measure(settings, wanted, work, place)
        if work.processes.main:
            order = [model.title for model in settings.models]
            found = sorted(_rows(place), key=lambda r: (order.index(r["model"]), -r.get("steps", 0)))
            _write(settings.out, found)
            _show(console, found)
            drawn = plots.tradeoffs(settings.out, found)
            work.say(f"table: {settings.out / 'benchmark.md'}")
            work.say(
                f"plots: {', '.join(map(str, drawn))}"
                if drawn
                else "no plots: they need matplotlib (pip install 'diffkd[report]') and rows with FID"
            )
    finally:
        folder.close()
    return settings.out


def _rows(place: Path) -> list[Record]:
    return records.load(place) if place.exists() else []


def _wanted(settings: config.Benchmark, found: Sequence[Record]) -> list[Target]:
    """What is left to measure, each model with its step counts that have no row yet."""
    done = {(r["model"], r.get("steps")) for r in found}
    names = {r["model"] for r in found}
    teacher = settings.teacher if "agreement" in settings.evaluation.metrics else None
    wanted = []
    for model in settings.models:
        left = tuple(steps for steps in model.steps if (model.title, steps) not in done)
        if left or (not model.steps and model.title not in names):
            wanted.append(Target(
                model.path, name=model.title, steps=left, guidance=model.guidance, stock=model.stock,
                null_label=model.null_label, quantize=model.quantize,
                teacher=teacher.path if teacher else None,
                teacher_steps=teacher.steps[0] if teacher and teacher.steps else AGREEMENT_STEPS,
                teacher_guidance=teacher.guidance if teacher else 1.0,
            ))  # fmt: skip
    return wanted


def _check(settings: config.Benchmark, wanted: Sequence[Target], work: Work) -> None:
    """Raises UserError for what could only fail later, when there is a folder already."""
    how = settings.evaluation
    reference = Reference(how.reference)
    require(how, reference)
    for subject in wanted:
        next(opened(subject, how, reference, work.processes.device))
    teacher_of(wanted[0], how, reference, work.processes.device)


def _measure(settings: config.Benchmark, wanted: Sequence[Target], work: Work, place: Path) -> None:
    if not wanted:
        return
    evaluator = work.evaluator(settings.evaluation, Reference(settings.evaluation.reference))
    for subject in wanted:
        for record in work.measure(evaluator, subject, warm_up=True):
            if work.processes.main:
                append_json(place, {**record, "role": "benchmark"})


def _cells(found: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows."""
    values = [records.shown(record) for record in found]
    titles = list(dict.fromkeys(title for value in values for title in value))
    first = records.seconds_per_image(found[0])
    rows = [
        [
            str(record["model"]), str(record.get("steps", "")), str(record.get("nfe", "")),
            *(value.get(title, "") for title in titles),
            f"{1 / records.seconds_per_image(record):.0f}",
            f"{first / records.seconds_per_image(record):.3g}",
            _millions(record, "parameters", 1), _millions(record, "macs", record.get("nfe", 1)),
        ]
        for record, value in zip(found, values, strict=True)
    ]  # fmt: skip
    return ["model", "steps", "nfe", *titles, "images/s", "times the first", "parameters", "MACs/image"], rows


def _millions(record: Record, key: str, times: int) -> str:
    return f"{record[key] * times / 1e6:.2f} M" if key in record else ""


def _show(console: Console, found: Sequence[Record]) -> None:
    """Without the spreads that benchmark.md has beside some numbers."""
    titles, rows = _cells(found)
    short = [title.replace(" to teacher", "").replace("feature ", "") for title in titles]
    tables.show(console, short, [[cell.split(" ±")[0].split(" [")[0] for cell in row] for row in rows])


def _text(name: str) -> str:
    """A name in Markdown: no cell of its own, and no markup of HTML."""
    return html.escape(printable(name), quote=False).replace("|", "&#124;")


def _write(folder: Path, found: Sequence[Record]) -> None:
    titles, rows = _cells(found)
    protocol = found[0]["protocol"]
    lines = [
        "| " + " | ".join(titles) + " |",
        "|" + "---|" * len(titles),
        *("| " + " | ".join([_text(row[0]), *row[1:]]) + " |" for row in rows),
        "",
        f"{protocol['samples']:,} images, {_text(protocol['features']['name'])} features, against "
        f"{_text(protocol['reference']['name'])}; images/s are of one process on {protocol['device']}. "
        "The whole protocol of every row is in metrics.json.",
    ]
    with new_file(folder / "benchmark.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
