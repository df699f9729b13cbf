"""`diffkd benchmark`: models x steps x guidance x metrics, one row at a time, into one table and plots."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from diffkd.errors import printable
from diffkd.io import progress
from diffkd.io.files import append_json, new_file
from diffkd.io.processes import Processes
from diffkd.metrics.evaluation import networks, records
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.evaluation.records import Record
from diffkd.metrics.evaluation.reference import Reference
from diffkd.metrics.evaluation.targets import AGREEMENT_STEPS, Target, opened, teacher_of
from diffkd.runs import config_files
from diffkd.runs.benchmark_config import Benchmark
from diffkd.runs.measurement import Measurement
from diffkd.runs.reports import guidance_curves, markdown, plots, tables
from diffkd.training.run_folder import RunFolder


def run(settings: Benchmark, console: Console) -> Path:
    """Measures every row that metrics.json does not hold yet; the benchmark's folder."""
    processes = Processes()
    place = settings.out / "metrics.json"
    wanted = _wanted(settings, _rows(place))
    if wanted:
        _check(settings.evaluation, wanted, processes)
    folder = RunFolder(settings.out, config_files.resolved(settings), owner=processes.main, allow=None)
    try:
        if processes.main:
            folder.describe(str(processes.device), processes.world)
        if wanted:
            reference = Reference(settings.evaluation.reference)
            measurement = Measurement(settings.evaluation, reference, processes, console)
            for target in wanted:
                for record in measurement.records(target, warm_up=True):
                    if processes.main:
                        progress.say(
                            console, _line(record, target.guidance)
                        )  # before it is written: no full disk loses it
                        append_json(place, {**record, "role": "benchmark"})
        if processes.main:
            order = [model.title for model in settings.models]
            found = sorted(
                _rows(place),
                key=lambda r: (order.index(r["model"]), -r.get("steps", 0), guidance_curves.weight(r)),
            )
            _show(console, found)
            _write(settings.out, found)
            drawn = [*plots.tradeoffs(settings.out, found), *guidance_curves.write(settings.out, found)]
            progress.say(console, f"table: {settings.out / 'benchmark.md'}")
            said = f"plots: {', '.join(map(str, drawn))}"
            missing = "no plots: they need matplotlib (pip install matplotlib) and rows with FID"
            progress.say(console, said if drawn else missing)
    finally:
        folder.close()
    return settings.out


def _rows(place: Path) -> list[Record]:
    return records.load(place) if place.exists() else []


def _wanted(settings: Benchmark, found: Sequence[Record]) -> list[Target]:
    """What is still to be measured: each model and guidance with the step counts that have no row yet."""
    teacher = settings.teacher if "agreement" in settings.evaluation.metrics else None
    wanted = []
    for model, weight in [(entry, w) for entry in settings.models for w in entry.weights]:
        rows = [r for r in found if r["model"] == model.title]
        if weight is not None:
            rows = [r for r in rows if guidance_curves.weight(r) == weight]
        done = {r.get("steps") for r in rows}
        left = tuple(steps for steps in model.steps if steps not in done)
        if left or (not model.steps and not done):
            wanted.append(Target(
                model.path, name=model.title, steps=left, guidance=weight, stock=model.stock,
                null_label=model.null_label, quantize=model.quantize, prompts=model.prompts,
                opening=model.opening, guidance_kind=model.guidance_kind,
                teacher=teacher.path if teacher else None,
                teacher_steps=teacher.steps[0] if teacher and teacher.steps else AGREEMENT_STEPS,
                teacher_guidance=teacher.guidance[0] if teacher and teacher.guidance else None,
                teacher_opening=teacher.opening if teacher else {},
                teacher_kind=teacher.guidance_kind if teacher else None,
            ))  # fmt: skip
    return wanted


def _check(evaluation: Evaluation, wanted: Sequence[Target], processes: Processes) -> None:
    """Raises UserError for whatever could otherwise fail only after the folder was made."""
    reference = Reference(evaluation.reference)
    networks.check(evaluation, reference)
    for target in wanted:
        next(opened(target, evaluation, reference, processes.device))
    teacher_of(wanted[0], evaluation, reference, processes.device)


def _line(record: Record, guidance: float | None) -> str:
    """A row as it comes. guidance: the weight that was asked for."""
    steps = f", {record['steps']} steps" if "steps" in record else ""
    steps += "" if guidance is None else f", guidance {guidance:g}"
    numbers = ", ".join(f"{title} {value}" for title, value in records.formatted(record).items())
    return f"{record['model']}{steps}: {numbers}"


def _cells(found: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows."""
    values = [records.formatted(record) for record in found]
    titles = list(dict.fromkeys(title for value in values for title in value))
    first = records.seconds_per_image(found[0])
    swept = guidance_curves.swept(found)
    rows = [
        [
            str(record["model"]), str(record.get("steps", "")),
            *([f"{guidance_curves.weight(record):g}"] if swept else []), str(record.get("nfe", "")),
            *(value.get(title, "") for title in titles),
            f"{1 / records.seconds_per_image(record):.0f}",
            f"{first / records.seconds_per_image(record):.3g}",
            _millions(record, "parameters", 1), _millions(record, "macs", record.get("nfe", 1)),
        ]
        for record, value in zip(found, values, strict=True)
    ]  # fmt: skip
    head = ["model", "steps", *(["guidance"] if swept else []), "nfe", *titles]
    return [*head, "images/s", "times the first", "parameters", "MACs/image"], rows


def _millions(record: Record, key: str, times: int) -> str:
    return f"{record[key] * times / 1e6:.2f} M" if key in record else ""


def _show(console: Console, found: Sequence[Record]) -> None:
    """Without the spreads that benchmark.md has beside some numbers."""
    titles, rows = _cells(found)
    short = [title.replace(" to teacher", "").replace("feature ", "") for title in titles]
    tables.show(console, short, [[cell.split(" ±")[0].split(" [")[0] for cell in row] for row in rows])


def _text(name: str) -> str:
    """A name in Markdown: it stays in its cell, and no markup of HTML survives."""
    return html.escape(printable(name), quote=False).replace("|", "&#124;")


def _write(folder: Path, found: Sequence[Record]) -> None:
    titles, rows = _cells(found)
    protocol = found[0]["protocol"]
    lines = [
        *markdown.table(titles, [[_text(row[0]), *row[1:]] for row in rows]),
        "",
        f"{protocol['samples']:,} images, {_text(protocol['features']['name'])} features, against "
        f"{_text(protocol['reference']['name'])}; images/s are of one process on {protocol['device']}. "
        "The whole protocol of every row is in metrics.json.",
    ]
    with new_file(folder / "benchmark.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
