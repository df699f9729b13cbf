"""Text from outside, made fit to be kept and shown; JSON from outside, read."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

log = logging.getLogger("diffkd")
LONGEST = 2000  # characters of a line; of a longer one the middle goes: its end is the remedy
SECRETS = re.compile(
    r"(?<=://)[^/\s]+(?=@)"  # user and password of a URL
    r"|\b(?:hf|api_org|gh[opsu]|github_pat|glpat|sk)[_-](?:(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{8,}|[a-z]{16,})\w*"
    r"|(?i:(?<=bearer )[^\s'\"]+)"
)
NAMED_SECRETS = re.compile(  # of an address, an override or a header
    r"(?i)((?:token|password|passwd|secret|signature|credential|api_?key|access_?key)['\"]?\s?=\s?['\"]?)"
    r"[^\s&'\",;)]+"
)


def masked(text: str) -> str:
    """The text without what looks like a token or a password: it may be kept and shown."""
    return NAMED_SECRETS.sub(r"\1***", SECRETS.sub("***", text))


def printable(text: str) -> str:
    """The text as one line, with escapes for what a terminal would obey or cannot show."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def line(text: str) -> str:
    """What of a text from anywhere may stand in a log or a terminal."""
    text = printable(masked(text))
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


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
