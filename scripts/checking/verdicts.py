"""What the parts' output says: tables as they are, and the ratios that were asked for, met or missed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

NETWORK_RATE = 0.95  # of the captured network's own rate, in memory
OVER_STOCK = {1: 2.0, 16: 2.0, 256: 1.2}  # by batch size
UPDATE = 1.05  # of the minimum written out by hand
ELSEWHERE = "The ratios are asked of a GPU: not on a CPU."


def tables(text: str) -> str:
    """The lines of Markdown tables, apart from each other."""
    kept = [line if line.startswith("|") else "" for line in text.splitlines()]
    return re.sub(r"\n\n+", "\n\n", "\n".join(kept)).strip()


def rows(text: str) -> list[dict[str, str]]:
    """The rows of all tables, by the heads of their columns; a row that was cut is left out."""
    found, head = list[dict[str, str]](), list[str]()
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells
        elif len(cells) == len(head) and line.endswith("|") and set(cells[0]) != {"-"}:
            found.append(dict(zip(head, cells, strict=True)))
    return found


def verdict(what: str, found: Mapping[str, float], met: Callable[[str, float], bool]) -> str:
    """A line: how many of these were met, and the others with their numbers."""
    missed = {name: value for name, value in found.items() if not met(name, value)}
    named = ", ".join(f"{name} {value:.3f}" for name, value in missed.items())
    if not found:
        return f"- {what}: not measured"
    if not missed:
        return (
            f"- {what}: **met** by all {len(found)}, {min(found.values()):.3f} to {max(found.values()):.3f}"
        )
    return f"- {what}: **missed** by {len(missed)} of {len(found)} ({named})"


def sampling(text: str, device: str) -> str:
    """Of scripts/bench_sampling.py: what draws as `diffkd sample` does is the captured graph."""
    table = tables(text)
    if device != "cuda":
        return f"{table}\n\n{ELSEWHERE}"
    captured = [row for row in rows(text) if row["path"] == "graph"]
    names = {f"{row['network'].split()[0]} at {row['batch']}": row for row in captured}
    ratios = {name: float(row["ratio"]) for name, row in names.items()}
    over = {name: float(row["over stock"]) for name, row in names.items() if row["over stock"]}
    lines = [
        verdict(
            f"generation over the captured network's own rate, at least {NETWORK_RATE}", ratios,
            lambda name, ratio: ratio >= NETWORK_RATE,
        ),
        verdict(
            "generation over the stock pipeline, at least "
            + ", ".join(f"{ratio} at batch {batch}" for batch, ratio in OVER_STOCK.items()),
            over,
            lambda name, ratio: ratio >= OVER_STOCK.get(int(names[name]["batch"]), 0),
        ),
    ]  # fmt: skip
    return "\n".join([table, "", *lines])


def training(text: str, device: str) -> str:
    """Of scripts/bench_training.py."""
    table = tables(text)
    if device != "cuda":
        return f"{table}\n\n{ELSEWHERE}"
    updates = [row for row in rows(text) if "ratio" in row]
    found = {f"{row['network'].split()[0]} at {row['batch']}": float(row["ratio"]) for row in updates}
    line = verdict(
        f"an update over the minimum, at most {UPDATE}", found, lambda name, ratio: ratio <= UPDATE
    )
    return f"{table}\n\n{line}"


def tests(text: str) -> str:
    """Of pytest: its last line, and the tests that failed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    failed = [f"- {line}" for line in lines if line.startswith(("FAILED", "ERROR"))]
    last = lines[-1].strip("= ") if lines else "no output"
    return "\n".join([f"`{last}`", *(["", *failed] if failed else [])])
