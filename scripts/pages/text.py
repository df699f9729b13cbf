"""Plain text of docstrings and descriptions as Markdown."""

from __future__ import annotations

import inspect
import re


def paragraph(doc: str | None, number: int = 0) -> str:
    """A paragraph of a docstring, on one line."""
    return " ".join(inspect.cleandoc(doc or "").split("\n\n")[number].split())


def escaped(text: str) -> str:
    """What Markdown would take for marks: stars, tags, and the bars of a table. Code in backticks stays."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*<|\[\]])", r"\\\1", part) for part in parts)
