"""Text and JSON from outside: read, quoted, compared."""

from __future__ import annotations

import json
import logging
from typing import Any

from diffkd.errors import line

log = logging.getLogger("diffkd")


def reason(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    said = (part.strip() for part in str(error).splitlines())
    return next((part for part in said if part), type(error).__name__)


def quoted(value: object, longest: int = 200) -> str:
    """A value as Python would write it, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits, lists within lists
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= longest else f"{text[:longest]}..."


def from_json(text: str) -> Any:
    """Raises ValueError for what is no JSON, and for lists within lists without end."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class _Lines(logging.Filter):
    """Names of files and texts of errors come from anywhere: each record is one clean line."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = line(record.getMessage()), None
        return True


log.addFilter(_Lines())


def changes(before: Any, now: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two nested mappings differ: {"key.sub": (before, now)}."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        inner = (changes(before.get(k), now.get(k), f"{where}.{k}".lstrip(".")) for k in keys)
        return {key: pair for found in inner for key, pair in found.items()}
    return {} if before == now else {where: (before, now)}


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """The same, each as "key was x, now y"."""
    return [f"{key} was {was}, now {value}" for key, (was, value) in changes(before, now, where).items()]
