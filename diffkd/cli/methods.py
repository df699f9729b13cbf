"""`diffkd methods`."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from diffkd.cli.completion import among, method_names

PACKAGE = Path(__file__).parents[1]
LEGEND = """
noised images: where the teacher is asked; what it draws itself does as well (data.draws)
pairs: noises and the teacher's images of them, which a run draws first
fake: a denoiser of the student's images, which learns all the while
heads: a small discriminator on blocks of a network
target: an average of the student
first: the student as the stage before it left it
weight: of each time in the loss, by a small network
diffkd methods NAME says what one takes in memory and network calls, and its settings."""


def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            help="One of them, or one of your own, in full; default a list of all.",
            autocompletion=among(*method_names()),
        ),
    ] = None,
) -> None:
    """List the distillation methods, or show one with its paper and its config."""
    if name is not None:
        print("\n".join(_in_full(name)))
        return
    titles = ("method", "paper", "learns from", "more networks", "what it does")
    rows = [titles, *map(_summary, method_names())]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for *cells, phrase in rows:
        padded = (f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True))
        print("  ".join([*padded, phrase]))
    print(LEGEND)


def _summary(name: str) -> tuple[str, str, str, str, str]:
    """The cells of its row, read from the source: importing torch for a list takes seconds."""
    tree = ast.parse((PACKAGE / "methods" / f"{name}.py").read_text(encoding="utf-8"))
    said = {
        ast.unparse(line.target): line.value
        for kind in tree.body
        if isinstance(kind, ast.ClassDef)
        for line in kind.body
        if isinstance(line, ast.AnnAssign) and line.value
    }
    paper: str = ast.literal_eval(said["reference"]).rpartition(", http")[0]
    call = said.get("needs")
    given = call.keywords if isinstance(call, ast.Call) else []
    needs: dict[str, Any] = {word.arg: ast.literal_eval(word.value) for word in given if word.arg}
    phrase = (ast.get_docstring(tree) or "").partition("\n")[0]
    return name, paper, _source(**needs), ", ".join(needs.get("networks", ())) or "none", phrase


def _source(
    *, data: bool = True, real: bool = False, pairs: bool = False, after: str = "", **more: Any
) -> str:
    """What a method learns from: fields of `methods.base.Needs`."""
    images = "images" if real else "noised images"
    source = "pairs" if pairs else images if data else "its teacher alone"
    return f"{source}, after {after}" if after else source


def _in_full(name: str) -> list[str]:
    """Of a built-in method, or of the user's own, which is imported."""
    from diffkd.cli.options import prepare_libraries

    prepare_libraries()
    from diffkd.methods import find

    kind = find(name)
    about = [inspect.cleandoc(doc) for doc in (sys.modules[kind.__module__].__doc__, kind.__doc__) if doc]
    lines = [f"{name}: " + "\n\n".join(about), "", f"paper: {kind.reference}"]
    needs = kind.needs
    more = needs.memory or (
        f"a student's for each of {', '.join(needs.networks)}" if needs.networks else "none"
    )
    guided = "guidance" in kind.model_fields and "teacher" in needs.calls
    lines += [f"learns from: {_source(**vars(needs))}"]
    lines += [f"networks beside teacher and student: {', '.join(needs.networks) or 'none'}"]
    lines += [f"memory over teacher and student: {more}"]
    lines += (
        [f"network calls in an update: {needs.calls}" + guided * "; guidance doubles the teacher's"]
        if needs.calls
        else []
    )
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
