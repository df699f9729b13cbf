"""Text and JSON from outside: parsing, quoting, comparing; the log."""

from __future__ import annotations

import json
import logging
import os
import re
import stat
from pathlib import Path
from typing import Any

from diffkd.errors import one_line

log = logging.getLogger("diffkd")
MAX_TEXT = 1 << 28  # bytes


def reason(error: BaseException) -> str:
    """The first non-empty line of an error's message, or its type's name where there is none."""
    lines = (part.strip() for part in str(error).splitlines())
    return next((part for part in lines if part), type(error).__name__)


def quoted(value: object, longest: int = 200) -> str:
    """repr() of a value, truncated to `longest` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits, deeply nested lists
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= longest else f"{text[:longest]}..."


def without_surrogates(text: str) -> str:
    """Text that UTF-8 can hold: halves of surrogate pairs, as JSON may have them, are joined or replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def counted(number: int, thing: str) -> str:
    """1 step, 2 steps: for things whose plural ends in s."""
    return f"{number:,} {thing}" + "s" * (number != 1)


def a_or_an(name: str) -> str:
    """A name after the article of its sound: a UNet2DModel, an SD3Transformer2DModel, an AutoencoderKL.

    Two capitals, or a capital and a digit, are read letter by letter, but for SANA, which is a word.
    """
    if re.match(r"[A-Z][A-Z\d]", name) and not name.startswith("SANA"):
        vowel = name[0] in "AEFHILMNORSX"
    else:
        vowel = re.match(r"[aeio]|u(?!ne|ni|se|ti)", name.lower()) is not None
    return f"{'an' if vowel else 'a'} {name}"


def is_number(text: str) -> bool:
    """Whether it is a whole number in ASCII digits, not too long for int()."""
    return text.isascii() and text.isdigit() and len(text) < 1000


def read_text(path: Path) -> str:
    """The text of a file in UTF-8. Raises OSError, and ValueError for a pipe or a device, which might never
    end, and for a file that is too long to be text."""
    flags = getattr(os, "O_NONBLOCK", 0)  # opening a pipe would wait for somebody to write into it
    with open(path, "rb", opener=lambda name, mode: os.open(name, mode | flags)) as stream:
        info = os.fstat(stream.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise ValueError("it is a pipe, a socket or a device, not a file")
        if info.st_size > MAX_TEXT:
            raise ValueError(f"it is {info.st_size >> 20} MiB long, and text is at most {MAX_TEXT >> 20}")
        return stream.read().decode()


def from_json(text: str) -> Any:
    """Parses JSON. Raises ValueError for anything else, and where it is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class _OneLine(logging.Filter):
    """File names and error messages come from anywhere: every record is made one clean line."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = one_line(record.getMessage()), None
        return True


log.addFilter(_OneLine())


def changes(before: Any, now: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two nested mappings differ: {"key.sub": (before, now)}."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        inner = (changes(before.get(k), now.get(k), f"{where}.{k}".lstrip(".")) for k in keys)
        return {key: pair for changed in inner for key, pair in changed.items()}
    return {} if before == now else {where: (before, now)}


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """`changes` in words: "key was x, now y"."""
    return [f"{key} was {was}, now {value}" for key, (was, value) in changes(before, now, where).items()]


def format_bytes(size: float) -> str:
    """Such as 1.23 MB."""
    power = next((p for p in range(4) if size < 999.5 * 1000**p), 4)
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
