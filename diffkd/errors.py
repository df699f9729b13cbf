"""Errors that end a command with one line, and the cleaning of text for that line. Standard library only."""

from __future__ import annotations

import re

MAX_LINE = 2000  # characters; a longer line loses its middle, since the remedy stands at its end
SECRETS = re.compile(
    r"(?<=://)[^/\s]+(?=@)"  # user and password of a URL
    r"|\b(?:hf|api_org|gh[opsu]|github_pat|glpat|sk)[_-](?:(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{8,}|[a-z]{16,})\w*"
    r"|(?i:(?<=bearer )[^\s'\"]+)"
)
NAMED_SECRETS = re.compile(  # in a URL, an override or a header
    r"(?i)((?:token|password|passwd|secret|signature|credential|api_?key|access_?key)['\"]?\s?=\s?['\"]?)"
    r"[^\s&'\",;)]+"
)


def masked(text: str) -> str:
    """The text with whatever looks like a token or a password replaced by ***."""
    return NAMED_SECRETS.sub(r"\1***", SECRETS.sub("***", text))


def printable(text: str) -> str:
    """The text as one line; characters that a terminal would obey or cannot show are escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """Text from any source made safe for a log or a terminal: masked, printable, at most MAX_LINE long."""
    text = printable(masked(text))
    return text if len(text) <= MAX_LINE else f"{text[: MAX_LINE // 2]} ... {text[-MAX_LINE // 2 :]}"


class UserError(ValueError):
    """A mistake in the user's input. The message is one line: the thing, the value, the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class Unfinished(Exception):
    """Work that stopped early, for the reason in its one-line message; the same command resumes it."""


class Interrupted(Exception):
    """Work that was asked to stop early; what was done is kept.

    saved: whether a checkpoint was saved on stopping. due: whether a time limit asked, rather than a signal.
    """

    def __init__(self, saved: bool = False, *, due: bool = False) -> None:
        super().__init__("stopped before the end; what was done is kept, and the same call resumes it")
        self.saved, self.due = saved, due
