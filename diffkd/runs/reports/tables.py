"""Records in a terminal: a table of one evaluation, and records side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffkd.core import guidance_kinds
from diffkd.errors import printable
from diffkd.io import progress
from diffkd.metrics.evaluation import comparison, records
from diffkd.metrics.evaluation.records import Record
from diffkd.metrics.evaluation.reference import NONE
from diffkd.metrics.features.trained import PREFIX


def show(console: Console, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table at its full width, however narrow the output is; nothing in it is markup."""
    table = Table()
    for i, title in enumerate(titles):
        table.add_column(Text(printable(title)), justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    wide = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    Console(file=console.file, width=max(wide, console.width), quiet=console.quiet).print(table)


def show_evaluation(
    found: Sequence[Record], target: str, console: Console, *, as_json: bool = False, out: Path | None = None
) -> None:
    """The records of one target: a table and what a reader must know, or JSON on stdout and nothing else."""
    if not found:
        return  # another process shows them
    if as_json:
        print(json.dumps(found[0] if len(found) == 1 else found, indent=2))
        return
    against = found[0]["protocol"]["reference"]
    progress.say(console, target if against["spec"] == NONE else f"{target} against {against['name']}")
    _show_columns(found, console)
    for line in notes(found):
        progress.say(console, line)
    if out is not None:
        progress.say(console, f"records: {out}")


def _show_columns(found: Sequence[Record], console: Console) -> None:
    """A column for each record, a row for each number. They share a protocol but for the steps."""
    values = [records.formatted(record) for record in found]
    rows = [[name, *(value[name] for value in values)] for name in values[0]]
    if "nfe" in found[0]:
        rows.append(["network evaluations", *(str(record["nfe"]) for record in found)])
        rates = (1 / records.seconds_per_image(record) for record in found)
        rows.append(["images/s of a process", *(f"{rate:.0f}" for rate in rates)])
    stepped = "steps" in found[0]
    titles = ["steps", *(str(r["steps"]) for r in found)] if stepped else ["", *(r["model"] for r in found)]
    show(console, titles, rows)


def notes(found: Sequence[Record]) -> list[str]:
    """What a reader must know of these numbers."""
    record = found[0]
    protocol = record["protocol"]
    name, count = protocol["features"]["name"], protocol["samples"]
    labels = f", labels: {protocol['labels'] or 'none'}" if "labels" in protocol else ""
    lines = [f"{count:,} images, {name} features{labels}"]
    if "fid_floor" in record:
        about = "at least" if protocol["reference"].get("count") is None else "about"  # of unknown error
        lines.append(
            f"{count:,} images are few: fresh data would have an FID of {about} {record['fid_floor']:.3g} "
            "here (expected from the spectrum of the reference's covariance); compare at equal counts only"
        )
    if "fid" in record and name != "inception" and not name.startswith(PREFIX):  # whose own note says more
        lines.append(f"FID by the features {name!r} is not comparable with FID by Inception features")
    if protocol["evaluation"]["allow_mismatch"]:
        lines.append("a mismatch of features was allowed: these numbers compare with no others")
    return lines + list(dict.fromkeys(note for each in found for note in each.get("notes", [])))


def compare(one: Path, two: Path, console: Console) -> bool:
    """What two files of records have in common, side by side; or what differs in their protocols, and no
    number, where they have nothing."""
    first, second = records.load(one), records.load(two)
    for a in first:
        for b in second:
            differ = comparison.mismatch(a, b)
            if differ or not comparison.comparable(a, b):
                progress.say(console, f"{one} and {two} cannot be compared:")
                metrics = (", ".join(r["protocol"]["metrics"]) for r in (a, b))
                for line in differ or [f"metrics were {next(metrics)}, now {next(metrics)}: none in common"]:
                    progress.say(console, f"  {line}")
                return False
    found = [(path, record) for path, group in ((one, first), (two, second)) for record in group]
    common = [
        key
        for key in records.VALUES
        if all(key in comparison.comparable(a, b) for a in first for b in second)
    ]
    titles = [""]
    for path, record in found:
        steps = f", {record['steps']} steps" if "steps" in record else ""
        if kind := record["protocol"].get("guidance_kind"):  # else how it was drawn is beside the point
            steps += f", guided {guidance_kinds.in_words(kind)}"
        titles.append(f"{path}: {record['model']}{steps}")
    names = [records.VALUES[key].title for key in common]
    show(
        console, titles, [[name, *(records.formatted(record)[name] for _, record in found)] for name in names]
    )
    left = sorted({n for _, r in found for n in records.formatted(r)} - set(names))
    for path, record in found:
        for note in record.get("notes", []):
            progress.say(console, f"{path}: {note}")
    if left:
        progress.say(console, f"not in all of them, or not by the same protocol: {', '.join(left)}")
    return True
