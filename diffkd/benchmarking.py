"""`diffkd benchmark`: models x steps x metrics, one row at a time, into one table and two plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from diffkd import charts, config
from diffkd.evaluating import Work
from diffkd.metrics import records
from diffkd.metrics.records import Record
from diffkd.metrics.reference import Reference
from diffkd.runs import Run, append_json, new_file, read_json
from diffkd.subjects import Subject


def run(settings: config.Benchmark, console: Console) -> Path:
    """Measures every row that metrics.json does not hold yet; the benchmark's folder."""
    work = Work(console)
    place = settings.out / "metrics.json"
    folder = Run(settings.out, config.resolved(settings), owner=work.processes.main)
    try:
        if work.processes.main:
            folder.describe(str(work.processes.device), work.processes.world)
        _measure(settings, work, place)
        if work.processes.main:
            found: list[Record] = read_json(place, [])
            _write(settings.out, found)
            _show(console, found)
            drawn = charts.tradeoffs(settings.out, found)
            work.say(f"table: {settings.out / 'benchmark.md'}")
            work.say(
                f"plots: {', '.join(map(str, drawn))}"
                if drawn
                else "no plots: they need matplotlib (pip install 'diffkd[report]') and rows with FID"
            )
    finally:
        folder.close()
    return settings.out


def _measure(settings: config.Benchmark, work: Work, place: Path) -> None:
    found = read_json(place, [])
    done = {(r["model"], r.get("steps")) for r in found} | {(r["model"], None) for r in found}
    wanted = []
    for model in settings.models:
        left = tuple(steps for steps in model.steps if (model.title, steps) not in done)
        if left or (not model.steps and (model.title, None) not in done):
            wanted.append((model, left))
    if not wanted:
        return
    evaluator = work.evaluator(settings.evaluation, Reference(settings.evaluation.reference))
    teacher = settings.teacher
    for model, steps in wanted:
        subject = Subject(
            model.path,
            steps=steps,
            guidance=model.guidance,
            stock=model.stock,
            null_label=model.null_label,
            teacher=teacher.path if teacher and not model.stock else None,
            teacher_steps=teacher.steps[0] if teacher and teacher.steps else Subject.teacher_steps,
            teacher_guidance=teacher.guidance if teacher else 1.0,
        )
        for record in work.measure(evaluator, subject, warm_up=True):
            record |= {"model": model.title, "role": "benchmark"}
            if work.processes.main:
                append_json(place, record)


def _cells(found: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows."""
    values = [records.shown(record) for record in found]
    titles = list(dict.fromkeys(title for value in values for title in value))
    rows = [
        [
            str(record["model"]), str(record.get("steps", "")), str(record.get("nfe", "")),
            *(value.get(title, "") for title in titles),
            f"{1 / records.seconds_per_image(record):.0f}",
            f"{record['parameters'] / 1e6:.2f} M" if "parameters" in record else "",
        ]
        for record, value in zip(found, values, strict=True)
    ]  # fmt: skip
    return ["model", "steps", "nfe", *titles, "images/s", "parameters"], rows


def _show(console: Console, found: Sequence[Record]) -> None:
    """The table at its full width, without the spreads that benchmark.md has beside some numbers."""
    titles, rows = _cells(found)
    shown = Table(title="benchmark", box=box.SIMPLE, padding=(0, 1))
    for title in titles:
        short = title.replace(" to teacher", "").replace("feature ", "")
        shown.add_column(short, justify="left" if title == "model" else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*(cell.split(" ±")[0].split(" [")[0] for cell in row))
    wide = console.measure(shown, options=console.options.update(max_width=1000)).maximum
    Console(file=console.file, width=max(wide, console.width)).print(shown)


def _write(folder: Path, found: Sequence[Record]) -> None:
    titles, rows = _cells(found)
    protocol = found[0]["protocol"]
    lines = [
        "| " + " | ".join(titles) + " |",
        "|" + "---|" * len(titles),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        f"{protocol['samples']:,} images, {protocol['features']['name']} features, against "
        f"{protocol['reference']['name']}; images/s are of one process on {protocol['device']}. "
        "The whole protocol of every row is in metrics.json.",
    ]
    with new_file(folder / "benchmark.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
