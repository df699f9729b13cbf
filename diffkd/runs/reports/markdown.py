"""Tables in Markdown, and text that cannot become markup in one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def escaped(value: Any) -> str:
    """Text for a table's cell: no markup of the quoted value survives, HTML's or Markdown's."""
    return "".join(c if c.isalnum() or c in " /,-" else f"&#{ord(c)};" for c in " ".join(str(value).split()))


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], rule: str = "---") -> list[str]:
    """The lines of a table; cells are Markdown. rule: below every title but the first, "--:" for numbers."""
    head = [_row(titles), "|" + "|".join(["---", *[rule] * (len(titles) - 1)]) + "|"]
    return [*head, *map(_row, rows)]


def facts(content: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """The lines of a table of these values, without those that are missing."""
    rows = [(key.replace("_", " "), escaped(content[key])) for key in keys if key in content]
    return ["| | |", "|---|---|", *map(_row, rows)]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
