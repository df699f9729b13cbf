"""`diffkd methods`."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

PACKAGE = Path(__file__).parents[1]
CONTRACT = "base"  # the one file among the methods that is none


def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            help="One of them, or one of your own, in full; default a list of all.",
            autocompletion=lambda incomplete: [m for m in _names() if m.startswith(incomplete)],
        ),
    ] = None,
) -> None:
    """List the distillation methods, or show one with its paper and its config."""
    if name is not None:
        print("\n".join(_in_full(name)))
        return
    rows = [_summary(each) for each in _names()]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for title, paper, phrase in rows:
        print(f"{title:{widths[0]}}  {paper:{widths[1]}}  {phrase}")


def _names() -> list[str]:
    return sorted(p.stem for p in (PACKAGE / "methods").glob("[a-z]*.py") if p.stem != CONTRACT)


def _summary(name: str) -> tuple[str, str, str]:
    """(name, paper, what it does), read from the source: importing torch for a list takes seconds."""
    tree = ast.parse((PACKAGE / "methods" / f"{name}.py").read_text(encoding="utf-8"))
    said = [
        ast.literal_eval(line.value)
        for kind in tree.body
        if isinstance(kind, ast.ClassDef)
        for line in kind.body
        if isinstance(line, ast.AnnAssign) and ast.unparse(line.target) == "reference" and line.value
    ]
    return name, said[0].rpartition(", http")[0], (ast.get_docstring(tree) or "").partition("\n")[0]


def _in_full(name: str) -> list[str]:
    """Of a built-in method, or of the user's own, which is imported."""
    from diffkd.cli.options import prepare_libraries

    prepare_libraries()
    from diffkd.methods import find

    kind = find(name)
    about = [inspect.cleandoc(doc) for doc in (sys.modules[kind.__module__].__doc__, kind.__doc__) if doc]
    lines = [f"{name}: " + "\n\n".join(about), "", f"paper: {kind.reference}"]
    if page := _page(name):
        lines.append(f"page: {page}")
    lines += ["", "config, as method: {name: " + name + ", ...}, with its defaults:"]
    for key, field in kind.model_fields.items():
        default = field.get_default(call_default_factory=True)
        value = "required" if field.is_required() else "null" if default is None else str(default)
        lines.append(f"  {key}: {value}  {field.description or ''}".rstrip())
    return lines


def _page(name: str) -> Path | None:
    """The method's page, in a checkout."""
    pages = PACKAGE.parent / "docs" / "methods"
    if not (pages / "README.md").is_file():
        return None
    row = re.search(rf"\[`{re.escape(name)}`\]\(([\w-]+\.md)\)", (pages / "README.md").read_text("utf-8"))
    return pages / row[1] if row else None
