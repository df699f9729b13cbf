"""What every room shares: the errors that end a command in one line, and the strict typed config object."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diffkd.text import line


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
