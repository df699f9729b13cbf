"""`diffkd compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    one: Annotated[Path, typer.Argument(help="A file of `diffkd evaluate --out`.", show_default=False)],
    two: Annotated[Path, typer.Argument(help="Another.", show_default=False)],
) -> int:
    """Two records side by side; where their protocols differ, what differs (exit status 1)."""
    from rich.console import Console

    from diffkd.runs.reports import tables

    return 0 if tables.compare(one, two, Console()) else 1
