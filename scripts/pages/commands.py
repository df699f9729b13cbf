"""The reference of the command: arguments and options of each subcommand, from the command itself."""

from __future__ import annotations

import inspect
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer

from diffkd import cli
from diffkd.cli.app import app
from pages.text import escaped, paragraph

INTRO = """# Commands

`diffkd COMMAND --help` says the same. Every command that takes a config takes overrides after it, as
`key.sub=value`. `diffkd --install-completion` completes commands, options and names in bash, zsh, fish and
PowerShell.
"""
WORDS = {int: "whole number", float: "number", str: "text", Path: "path", bool: ""}  # a flag takes nothing


def page() -> str:
    """The whole page, in Markdown."""
    parts = [INTRO]
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        parts += [f"## `diffkd {name}`", escaped(inspect.cleandoc(command.help or ""))]
        parts.append(f"```bash\n{(command.epilog or '').removeprefix('Example: ')}\n```")
        parts.append(table(command))
    parts += ["## Exit status", escaped(paragraph(cli.__doc__, 1).removeprefix("Exit status: "))]
    return "\n\n".join(parts) + "\n"


def table(command: Any) -> str:
    """A row for each argument and option of a command."""
    function = inspect.unwrap(command.callback)
    hints, signature = get_type_hints(function, include_extras=True), inspect.signature(function)
    lines = ["| | takes | default | |", "|---|---|---|---|"]
    for one in command.params:
        if one.name not in hints:
            continue  # --help
        kind, info = get_args(hints[one.name])
        names = ", ".join(f"`{name}`" for name in [*one.opts, *one.secondary_opts] if name.strip())
        if one.param_type_name == "argument":
            names = f"`{one.name.upper()}`"
        said = default(signature.parameters[one.name].default)
        lines.append(f"| {names} | {takes(kind)}{limits(info)} | {said} | {escaped(info.help or '')} |")
    return "\n".join(lines)


def takes(kind: Any) -> str:
    """What follows the name of an option: "" for a flag."""
    inside = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (one for one in inside if one is not types.NoneType)
        return takes(kind)
    if get_origin(kind) is list:
        return f"{takes(inside[0])}, any number of times"
    if get_origin(kind) is tuple:
        return " and ".join(map(takes, inside))
    return WORDS[kind]


def limits(info: Any) -> str:
    """The bounds of a number, in parentheses; "" for none."""
    said = [f"{info.min:,} or more"] if info.min is not None else []
    said += [f"at most {info.max:,}"] if info.max is not None else []
    return f" ({', '.join(said)})" if said else ""


def default(value: object) -> str:
    """What it is where it is not given: "" where its text says so, and for a flag."""
    if value is inspect.Parameter.empty:
        return "**required**"
    return "" if value is None or isinstance(value, bool) else f"`{value}`"
