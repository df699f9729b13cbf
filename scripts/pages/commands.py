"""The reference of the command: arguments and options of each subcommand, from the command itself."""

from __future__ import annotations

from typing import Any

import typer

from diffkd import cli
from diffkd.cli.app import app
from pages.text import escaped, paragraph

INTRO = """# Commands

`diffkd COMMAND --help` says the same. Every command that takes a config takes overrides after it, as
`key.sub=value`. `diffkd --install-completion` completes commands, options and names in bash, zsh, fish and
PowerShell.
"""


def page() -> str:
    """The whole page, in Markdown."""
    parts = [INTRO]
    for name, command in typer.main.get_command(app).commands.items():
        parts += [f"## `diffkd {name}`", escaped(command.help or "")]
        parts.append(f"```bash\n{(command.epilog or '').removeprefix('Example: ')}\n```")
        parts.append(table(command.params))
    parts += ["## Exit status", escaped(paragraph(cli.__doc__, 1).removeprefix("Exit status: "))]
    return "\n\n".join(parts) + "\n"


def table(parameters: list[Any]) -> str:
    """A row for each argument and option of a command."""
    lines = ["| | takes | default | |", "|---|---|---|---|"]
    for one in parameters:
        if one.name == "help":
            continue
        names = ", ".join(f"`{name}`" for name in [*one.opts, *one.secondary_opts] if name.strip())
        if one.param_type_name == "argument":
            names = f"`{one.name.upper()}`" + (" ..." if one.nargs == -1 else "")
        lines.append(f"| {names} | {takes(one)} | {default(one)} | {escaped(one.help or '')} |")
    return "\n".join(lines)


def takes(parameter: Any) -> str:
    """What follows the name: "" for a flag."""
    if getattr(parameter, "is_flag", False):
        return ""
    kind = parameter.type
    low, high = getattr(kind, "min", None), getattr(kind, "max", None)
    said = [f"{low:,} or more"] if low is not None else []
    said += [f"at most {high:,}"] if high is not None else []
    name = {"text": "text", "path": "path", "integer": "whole number", "float": "number"}.get(
        kind.name.removesuffix(" range"), "several"
    )
    return name + (f" ({', '.join(said)})" if said else "")


def default(parameter: Any) -> str:
    """What it is where it is not given: "" where the text says it, or nothing is."""
    if parameter.required:
        return "**required**"
    value = parameter.default
    if value is None or isinstance(value, bool | list | tuple) or value == "":
        return ""
    return f"`{value}`"
