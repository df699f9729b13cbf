"""`diffkd export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffkd.cli.options import among, prepare_libraries
from diffkd.models.exports import KINDS


def export(
    student: Annotated[str, typer.Argument(help="A student of a run: its folder.")],
    to: Annotated[
        str,
        typer.Option(
            "--to", help=f"{', '.join(KINDS)}; not every family has each.", autocompletion=among(*KINDS)
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The folder to write; default beside the student, as STUDENT-KIND."),
    ] = None,
) -> None:
    """Hand a student on in another form: for other programs, or in fewer bytes.

    Each has the student's scheduler and a card that says how it is read; docs/export.md has the table.
    """
    from rich.console import Console

    prepare_libraries()
    from diffkd.runs import export as job

    job.export(student, to, out, Console())
