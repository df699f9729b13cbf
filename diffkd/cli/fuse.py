"""`diffkd fuse`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffkd.cli.options import prepare_libraries


def fuse(
    student: Annotated[str, typer.Argument(help="A student that is an adapter (LoRA): its folder.")],
    out: Annotated[Path, typer.Option("--out", help="The folder of the pipeline to write.")],
) -> None:
    """Bake an adapter into its base: a whole stock pipeline, which needs neither of the two.

    It draws the student's images; of text-to-image UNets at the pipeline's default arguments.
    """
    from rich.console import Console

    prepare_libraries()
    from diffkd.runs import fuse as job

    job.fuse(student, out, Console())
