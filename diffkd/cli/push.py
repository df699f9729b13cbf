"""`diffkd push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffkd.cli.options import prepare_libraries


def push(
    folder: Annotated[Path, typer.Argument(help="A student, or an export of one: its folder.")],
    repository: Annotated[str, typer.Argument(help="On the Hugging Face Hub: owner/name.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private; default as its owner has it.")
    ] = False,
) -> None:
    """Upload a student to the Hugging Face Hub.

    With the token of hf auth login or HF_TOKEN. Nothing but this command uploads anything.
    """
    from rich.console import Console

    prepare_libraries()
    from diffkd.runs import push as job

    job.push(folder, repository, Console(), private=private)
