"""Strict config objects, and pydantic's validation errors as one line: the key, the value, the remedy."""

from __future__ import annotations

import difflib
import types
from collections.abc import Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffkd.io.text import quoted


class Strict(BaseModel):
    """Base of every config object: unknown keys are errors, numbers are finite, and values are frozen once
    read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, given: Any) -> Any:
        """To Python true is 1; in a config it is a slip. As a string, its own field refuses it."""
        if not isinstance(given, dict):
            return given
        checked = dict(given)
        for name in cls.model_fields.keys() & given.keys():
            types = _value_types(cls.model_fields[name].annotation)
            if types & {int, float} and bool not in types:
                checked[name] = _bools_as_strings(given[name])
            if _is_beyond(given[name]):
                raise ValueError(f"config key {name} holds a number of more than 64 bits; use a smaller one")
        return checked


def _value_types(annotation: Any) -> set[Any]:
    """The types in an annotation, and those of the values of its Literals."""
    inner = get_args(annotation)
    if inner:
        return set().union(*map(_value_types, inner))
    return {annotation if isinstance(annotation, type) else type(annotation)}


def _is_beyond(value: Any) -> bool:
    """Whether a whole number in it has more than 64 bits, which no array or generator can be given."""
    if isinstance(value, list):
        return any(map(_is_beyond, value))
    return type(value) is int and not -(2**63) <= value < 2**63


def _bools_as_strings(value: Any) -> Any:
    if isinstance(value, list):
        return [_bools_as_strings(item) for item in value]
    return str(value).lower() if isinstance(value, bool) else value


Beta = Annotated[float, Field(ge=0, lt=1)]  # of Adam
Positive = Annotated[int, Field(ge=1)]
MOST_IMAGES, LARGEST_BATCH = 100_000_000, 1 << 20  # beyond these a slip, which memory or hours would show


def validation_message(error: ValidationError, kind: type[Strict], prefix: str = "") -> str:
    """pydantic's first error as one line. kind: the config class that was validated. prefix: its own key."""
    unknown_key = ("extra_forbidden", "invalid_key")  # reported first: a misspelt key explains other errors
    first = min(error.errors(), key=lambda each: each["type"] not in unknown_key)
    keys, loc = _keys_at(kind, first["loc"])
    key = ".".join(str(part) for part in ([prefix] if prefix else []) + loc)
    if first["type"] in unknown_key:
        near = difflib.get_close_matches(str(first["loc"][-1]), keys, n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]}?" if near else f"known here are {', '.join(keys) or '(none)'}"
        return f"config key {key} is unknown; {remedy}"
    if first["type"] == "missing":
        return f"config key {key} is missing; add it (see configs/ for examples)"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message
    message = f"{message[0].lower()}{message[1:]}"
    if len(kinds := [tag for tag in map(_tag, _classes_at(kind, loc)) if tag]) > 1:
        message = f"it needs a kind, one of {', '.join(kinds)}"
    return f"config key {key} is {quoted(first['input'])}: {message}"


def _classes_at(kind: type[Strict], loc: Sequence[int | str]) -> list[type[Strict]]:
    """The config classes that the value at loc may belong to."""
    choices = [kind]
    keyed = False  # whether the next part is a name that the user chose, a key of a dict field
    for part in loc:
        if keyed:
            keyed = False
            continue
        fields = [c.model_fields[str(part)].annotation for c in choices if str(part) in c.model_fields]
        keyed = any(get_origin(annotation) is dict for annotation in fields)
        choices = [model for annotation in fields for model in _models(annotation)]
    return choices


def _keys_at(kind: type[Strict], loc: Sequence[int | str]) -> tuple[list[str], list[int | str]]:
    """The known keys of the object that loc ends in, and loc without pydantic's tags of union members."""
    path: list[int | str] = []
    choices: list[type[Strict]] = [kind]
    inside = keyed = False  # inside a value that has no keys; at a key of a dict field
    for part in loc[:-1]:
        tagged = [c for c in choices if len(choices) > 1 and _tag(c) == part]
        if tagged:
            choices = tagged
            continue
        fields = [c.model_fields[str(part)].annotation for c in choices if str(part) in c.model_fields]
        if keyed:
            path.append(part)
            keyed = False
            continue
        keyed = any(get_origin(annotation) is dict for annotation in fields)
        if fields or isinstance(part, int):
            path.append(part)
        inside = inside or (bool(fields) and not [m for a in fields for m in _models(a)])
        choices = [model for annotation in fields for model in _models(annotation)] or choices
    if loc and not (inside and isinstance(loc[-1], str)):
        path.append(loc[-1])
    return [name for c in choices for name in c.model_fields], path


def _tag(kind: type[Strict]) -> Any:
    """The value of `kind` that selects this class in a union, None where it has no such field."""
    field = kind.model_fields.get("kind")
    return get_args(field.annotation)[0] if field is not None else None


def _models(annotation: Any) -> list[type[Strict]]:
    """The config classes in an annotation."""
    if (origin := get_origin(annotation)) is not None:  # first: Python 3.10 calls list[int] a type
        within = origin in (Annotated, Union, types.UnionType, list, dict)
        return [model for inner in get_args(annotation) for model in _models(inner)] if within else []
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, Strict) else []
