"""How every command refuses bad input: exit status 2, one line, and no file changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below the folder: a file's bytes, None for a folder. Compiled Python is left out."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
        if "__pycache__" not in p.parts
    }


def refuse(cli: Callable[..., Any], folder: Path, *args: object, says: Sequence[str] | str = "") -> str:
    """The line with which the command `args` refuses, which must contain all of `says`."""
    before = tree(folder)
    code, out, err = cli(*args)
    assert (code, out, len(err.splitlines())) == (2, "", 1), (code, out, err)
    assert err.startswith("diffkd: error: ")
    for words in [says] if isinstance(says, str) else says:
        assert words in err
    assert tree(folder) == before
    line: str = err
    return line
