"""Files of prompts."""

from __future__ import annotations

import re
from pathlib import Path

from diffkd.errors import UserError
from diffkd.io.places import expanded
from diffkd.io.text import read_text, reason

LINE_END = re.compile(r"\r\n|\r|\n")  # and no other: a prompt may hold what Unicode calls a line separator
MAX_LINE = 100_000  # characters: no encoder takes so many, and a file of one line may be of another kind


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines are left out, and the mark that editors put at the
    beginning of UTF-8. Raises UserError."""
    path = expanded(path)
    try:
        lines = [line.strip() for line in LINE_END.split(read_text(path).removeprefix("\ufeff"))]
    except UnicodeDecodeError as error:
        raise UserError(
            f"prompt file {path} is not text in UTF-8 ({reason(error)}); save it as UTF-8"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"prompt file {path} cannot be read ({reason(error)}); give a text file") from error
    for number, line in enumerate(lines, 1):
        if "\0" in line or len(line) > MAX_LINE:
            what = "a NUL" if "\0" in line else f"{len(line):,} characters"
            raise UserError(f"{path} has {what} in line {number}; give a text file, a prompt a line")
    prompts = [line for line in lines if line]
    if not prompts:
        raise UserError(f"{path} has no prompts; give one a line")
    return prompts
