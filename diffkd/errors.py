"""Errors that end a command in one line, and text made fit for that line. Standard library only."""

from __future__ import annotations

import re

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


class UserError(ValueError):
    """A mistake in what the user gave. The message is one line: the thing, the value, the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(line(message))


class Unfinished(Exception):
    """Work that stopped half way, for the reason in the one line of its message; the same command goes on."""


class Interrupted(Exception):
    """Told to stop half way; what was done is kept.

    saved: whether a checkpoint was saved just now. due: by the time that was given, not by a signal.
    """

    def __init__(self, saved: bool = False, *, due: bool = False) -> None:
        super().__init__()
        self.saved, self.due = saved, due
