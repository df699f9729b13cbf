"""What every room shares: the error for a user's mistake, the strict typed config object, and what makes text
from outside fit to be shown."""

from __future__ import annotations

import importlib
import json
import logging
import re
from types import ModuleType
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

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


class UserError(ValueError):
    """A mistake in what the user gave. The message is one line: the thing, the value, the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(line(message))


class Unfinished(Exception):
    """Work that stopped half way, for the reason in the one line of its message; the same command goes on."""


class Interrupted(Exception):
    """Told to stop half way; what was done is saved. due: by the time that was given, not by a signal."""

    def __init__(self, due: bool = False) -> None:
        super().__init__()
        self.due = due


class _Lines(logging.Filter):
    """Names of files and texts of errors come from anywhere: each record is one clean line."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = line(record.getMessage()), None
        return True


log.addFilter(_Lines())
_announced: set[str] = set()


def own_module(name: str) -> ModuleType:
    """Imports a module of the user's own, which runs its code, and says so once.

    Only for names from a config or a command line. A name in a file that merely was there is not the user's.
    """
    module = importlib.import_module(name)
    if name not in _announced:
        _announced.add(name)
        log.warning("running code of yours: module %s (%s)", name, getattr(module, "__file__", "no file"))
    return module


class Strict(BaseModel):
    """Base of every config object: unknown keys are errors, values cannot change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, given: Any) -> Any:
        """To Python true is 1; in a config it is a slip. As a word its own field refuses it, by name."""
        if not isinstance(given, dict):
            return given
        checked = dict(given)
        for name in cls.model_fields.keys() & given.keys():
            kinds = _kinds(cls.model_fields[name].annotation)
            if kinds & {int, float} and bool not in kinds:
                checked[name] = _as_words(given[name])
        return checked


def _kinds(annotation: Any) -> set[Any]:
    """The types in an annotation, and of the values that it lists."""
    inner = get_args(annotation)
    if inner:
        return set().union(*map(_kinds, inner))
    return {annotation if isinstance(annotation, type) else type(annotation)}


def _as_words(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_words(one) for one in value]
    return str(value).lower() if isinstance(value, bool) else value


Positive = Annotated[int, Field(ge=1)]


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
