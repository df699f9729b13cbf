"""Records in a terminal: a table of one evaluation, and records side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from rich.console import Console
from rich.table import Table
from rich.text import Text
from diffkd.errors import printable
from diffkd.metrics.evaluation import records
from diffkd.metrics.evaluation.records import Record


def show(console: Console, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table at its full width, however narrow the output is; nothing in it is markup."""
    table = Table()
    for i, title in enumerate(titles):
        table.add_column(Text(printable(title)), justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    wide = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    Console(file=console.file, width=max(wide, console.width)).print(table)


def one_evaluation(console: Console, found: Sequence[Record]) -> None:
    """A column for each record, a row for each number. They share a protocol but for the steps."""
    values = [records.shown(record) for record in found]
    rows = [[name, *(value[name] for value in values)] for name in values[0]]
    if "nfe" in found[0]:
        rows.append(["network evaluations", *(str(record["nfe"]) for record in found)])
        rates = (1 / records.seconds_per_image(record) for record in found)
        rows.append(["images/s of a process", *(f"{rate:.0f}" for rate in rates)])
    stepped = "steps" in found[0]
    titles = ["steps", *(str(r["steps"]) for r in found)] if stepped else ["", *(r["model"] for r in found)]
    show(console, titles, rows)


def compare(one: Path, two: Path, console: Console) -> bool:
    """What two files of records have in common, side by side; or what differs in their protocols, and no
    number, where they have nothing."""

    def say(text: str) -> None:
        console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    first, second = records.load(one), records.load(two)
    for a in first:
        for b in second:
            differ = records.mismatch(a, b)
            if differ or not records.comparable(a, b):
                say(f"{one} and {two} cannot be compared:")
                metrics = (", ".join(r["protocol"]["metrics"]) for r in (a, b))
                for line in differ or [f"metrics were {next(metrics)}, now {next(metrics)}: none in common"]:
                    say(f"  {line}")
                return False
    found = [(path, record) for path, group in ((one, first), (two, second)) for record in group]
    common = [
        key for key in records.VALUES if all(key in records.comparable(a, b) for a in first for b in second)
    ]
    titles = [""]
    for path, record in found:
        steps = f", {record['steps']} steps" if "steps" in record else ""
        titles.append(f"{path}: {record['model']}{steps}")
    names = [records.VALUES[key][0] for key in common]
    show(console, titles, [[name, *(records.shown(record)[name] for _, record in found)] for name in names])
    left = sorted({n for _, r in found for n in records.shown(r)} - set(names))
    if left:
        say(f"not in all of them, or not by the same protocol: {', '.join(left)}")
    return True
