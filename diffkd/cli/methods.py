"""`diffkd methods`."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffkd.cli.completion import among, method_names

if TYPE_CHECKING:
    from diffkd.methods.base import Method

PACKAGE = Path(__file__).parents[1]
LEGEND = """
noised images: where the teacher is asked; what it draws itself does as well (data.draws)
pairs: noises and the teacher's images of them, which a run draws first
labels: or prompts; guidance needs them too, and an input that means none
fake: a denoiser of the student's images, which learns all the while
heads: a small discriminator on blocks of a network
target: an average of the student
first: the student as the stage before it left it
weight: of each time in the loss, by a small network
projectors: of the student's features to the widths of the teacher's
memory: over teacher and student; a student's is weights, gradients and moments of one more that learns
attention: of a jvp, which grows with the square of the tokens
calls: of each network in an update, in batches, by the defaults; guidance doubles the teacher's
(): with other settings than the defaults
diffkd methods NAME says all that in full, and the settings."""
TITLES = ("method", "learns from", "more networks", "memory", "calls")


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
    listed = {name: _summary(name) for name in method_names()}
    _print_table([("method", "what it does"), *((name, phrase) for name, (phrase, _) in listed.items())])
    print()
    _print_table([TITLES, *((name, *_cells(**needs)) for name, (_, needs) in listed.items())])
    print(LEGEND)


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _summary(name: str) -> tuple[str, dict[str, Any]]:
    """What it does, and the fields of its `methods.base.Needs`, read from the source: importing torch for a
    list takes seconds."""
    tree = ast.parse((PACKAGE / "methods" / f"{name}.py").read_text(encoding="utf-8"))
    said = {
        ast.unparse(line.target): line.value
        for kind in tree.body
        if isinstance(kind, ast.ClassDef)
        for line in kind.body
        if isinstance(line, ast.AnnAssign) and line.value
    }
    call = said.get("needs")
    given = call.keywords if isinstance(call, ast.Call) else []
    needs: dict[str, Any] = {word.arg: ast.literal_eval(word.value) for word in given if word.arg}
    return (ast.get_docstring(tree) or "").partition("\n")[0], needs


def _cells(
    *,
    networks: Sequence[str] = (),
    in_short: str = "",
    passes: Mapping[str, float] | None = None,
    labels: bool = False,
    after: str = "",
    **more: Any,
) -> tuple[str, ...]:
    """Those of the table of what methods need, by the fields of one's `Needs`."""
    source = _source(**more) + ", labels" * labels + (f", after {after}" if after else "")
    short = (re.sub(r"^(\w+) (with|where) .*", r"(\1)", network) for network in networks)
    return source, ", ".join(short) or "none", in_short or "none", _counted(passes or {})


def _source(*, data: bool = True, real: bool = False, pairs: bool = False, **more: Any) -> str:
    images = "images" if real else "noised images"
    return "pairs" if pairs else images if data else "its teacher alone"


def _counted(passes: Mapping[str, float]) -> str:
    return ", ".join(f"{count:g} {network}" for network, count in passes.items())


def _in_full(name: str) -> list[str]:
    """Of a built-in method, or of the user's own, which is imported."""
    from diffkd.cli.options import prepare_libraries

    prepare_libraries()
    from diffkd.methods import find

    kind = find(name)
    about = [inspect.cleandoc(doc) for doc in (sys.modules[kind.__module__].__doc__, kind.__doc__) if doc]
    lines = [f"{name}: " + "\n\n".join(about), "", f"paper: {kind.reference}"]
    lines += _needs_in_full(kind)
    if page := _page(name):
        lines.append(f"page: {page}")
    lines += ["", "config, as method: {name: " + name + ", ...}, with its defaults:"]
    for key, field in kind.model_fields.items():
        default = field.get_default(call_default_factory=True)
        value = "required" if field.is_required() else "null" if default is None else str(default)
        lines.append(f"  {key}: {value}  {field.description or ''}".rstrip())
    return lines


def _needs_in_full(kind: type[Method]) -> list[str]:
    from diffkd.core.denoiser import Denoiser

    needs, settings = kind.needs, kind.model_fields
    networks = ", ".join(needs.networks)
    source = _source(**vars(needs)) + (f", after a {needs.after} student" if needs.after else "")
    labels = ("labels or prompts" if kind.kind is Denoiser else "labels") if needs.labels else "none"
    null = ", and an input that means none" * needs.unconditional
    null += "; with guidance labels or prompts, and one that means none" * ("guidance" in settings)
    memory = needs.memory or (f"a student's for each of {networks}" if networks else "none")
    lines = [
        f"learns from: {source}",
        f"inputs beside the image: {labels}{null}",
        f"networks beside teacher and student: {networks or 'none'}",
        f"memory over teacher and student: {memory}",
    ]
    if needs.calls:
        more = "; guidance doubles the teacher's" * ("guidance" in settings and "teacher" in needs.calls)
        more += "; more steps, more of the student" * ("drawn" in settings)
        lines.append(f"network calls in an update: {needs.calls}{more}")
    if needs.passes:
        lines.append(f"the same by the defaults: {_counted(needs.passes)}")
    return lines


def _page(name: str) -> Path | None:
    """The method's page, in a checkout."""
    pages = PACKAGE.parent / "docs" / "methods"
    if not (pages / "README.md").is_file():
        return None
    row = re.search(rf"\[`{re.escape(name)}`\]\(([\w-]+\.md)\)", (pages / "README.md").read_text("utf-8"))
    return pages / row[1] if row else None
