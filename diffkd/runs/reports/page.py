"""The frame of every report: one page that stands alone, and its text, numbers and tables."""

from __future__ import annotations

import html
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from diffkd.errors import printable
from diffkd.io.files import new_file
from diffkd.runs.reports import plots


def escaped(text: str) -> str:
    """Text of the page: no markup in a name survives, and no character that cannot be shown."""
    return html.escape(printable(text))


def flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested objects as ("outer.inner", text); a list is read as a command line."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, shlex.join(map(str, value)) if isinstance(value, list) else str(value)


def number(value: float | None) -> str:
    """Three digits or so, without a power of ten where a reader would rather see none."""
    if value is None:
        return "–"
    size = abs(value)
    return f"{value:.3g}" if size < 0.01 else f"{value:.{3 if size < 1 else 2 if size < 100 else 0}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str) -> str:
    """Cells are text; they are escaped here."""
    top = "".join(f"<th>{escaped(cell)}</th>" for cell in head)
    lines = ("".join(f"<td>{escaped(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"


def write(folder: Path, sections: Callable[[], Sequence[str]]) -> Path | None:
    """Writes report.html of these sections, whose plots are drawn for it; None, and no page, without
    matplotlib."""
    try:
        with plots.drawing():
            body = "\n".join(sections())
    except ImportError:
        return None
    path = folder / "report.html"
    with new_file(path) as temporary:
        temporary.write_text(_page(folder.resolve().name, body), encoding="utf-8")
    return path


def _page(name: str, body: str) -> str:
    title = escaped(name)
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>{style}</style></head>
<body><main><h1>{title}</h1>
{body}
</main></body></html>
"""
