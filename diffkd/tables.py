"""Records in a terminal: a table of one evaluation, and two records side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from diffkd.metrics import records
from diffkd.metrics.records import Record


def table(found: Sequence[Record]) -> Table:
    """A column for each record, a row for each number. They share a protocol but for the steps."""
    shown = Table()
    shown.add_column("steps" if "steps" in found[0] else "")
    for record in found:
        shown.add_column(str(record.get("steps", "")), justify="right")
    values = [records.shown(record) for record in found]
    for name in values[0]:
        shown.add_row(name, *(value[name] for value in values))
    if "nfe" in found[0]:
        shown.add_row("network evaluations", *(str(record["nfe"]) for record in found))
        rates = (1 / records.seconds_per_image(record) for record in found)
        shown.add_row("images/s of a process", *(f"{rate:.0f}" for rate in rates))
    return shown


def compare(one: Path, two: Path, console: Console) -> bool:
    """Two records side by side; or, where their protocols differ, what differs instead of any number."""
    first, second = records.load(one), records.load(two)
    for a in first:
        for b in second:
            differ = records.mismatch(a, b)
            if differ:
                lines = [f"{one} and {two} cannot be compared:", *(f"  {line}" for line in differ)]
                for line in lines:
                    console.print(line, highlight=False, markup=False, soft_wrap=True)
                return False
    shown = Table(title="the same protocol")
    shown.add_column("")
    found = [(path, record) for path, group in ((one, first), (two, second)) for record in group]
    for path, record in found:
        steps = f", {record['steps']} steps" if "steps" in record else ""
        shown.add_column(f"{path}: {record['model']}{steps}", justify="right")
    values = [records.shown(record) for _, record in found]
    for name in dict.fromkeys(name for value in values for name in value):
        shown.add_row(name, *(value.get(name, "") for value in values))
    console.print(shown)
    return True
