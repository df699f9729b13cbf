"""Strict config objects, and strict YAML read into them; what is wrong in one line."""

from __future__ import annotations

import difflib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffkd.errors import UserError
from diffkd.io.text import quoted, reason


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


def read_yaml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a config file says, with `key.sub=value` overrides. Raises UserError for what is no YAML."""
    try:
        with path.open("rb") as stream:
            text = stream.read(MOST_BYTES + 1)
        content = _parsed(text)
    except OSError as error:
        raise UserError(f"config {path} cannot be read ({error.strerror}); give a YAML file") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"config {path} is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"config {path} holds no keys; see configs/ for examples")
    for override in overrides:
        _override(content, override)
    return content


MOST_BYTES, MOST_VALUES, DEEPEST = 1 << 20, 100_000, 50  # of a config: a page of text is usual


class _Loader(yaml.SafeLoader):
    """YAML's plain values. A key given twice, and what would be immense once read, are errors with a line."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.depth == DEEPEST:
            raise yaml.YAMLError(f"more than {DEEPEST} levels within levels, {_line(self.peek_event())}")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_document(self, node: Any) -> Any:
        self._check(node, {})
        return super().construct_document(node)

    def _check(self, node: Any, sizes: dict[int, int]) -> int:
        """How many values a node is when its aliases are written out."""
        if id(node) in sizes:
            if not sizes[id(node)]:  # being counted
                raise yaml.YAMLError(f"an alias within what it stands for, {_line(node)}")
            return sizes[id(node)]
        sizes[id(node)] = 0
        inner = [node] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in keys:
                        raise yaml.YAMLError(
                            f"key {key.value} is given twice, {_line(key)}; keep one of them"
                        )
                    keys.add(key.value)
            inner = [one for pair in node.value for one in pair]
        size = 1 if inner == [node] else 1 + sum(self._check(one, sizes) for one in inner)
        if size > MOST_VALUES:
            raise yaml.YAMLError(f"more than {MOST_VALUES} values with aliases written out, {_line(node)}")
        sizes[id(node)] = size
        return size


def _line(node: Any) -> str:
    return f"line {node.start_mark.line + 1}"


def _parsed(text: bytes | str) -> Any:
    """What a YAML text says. Raises yaml.YAMLError or ValueError."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"it is longer than {MOST_BYTES >> 20} MiB")
    loader = _Loader(text.decode() if isinstance(text, bytes) else text)
    try:
        return loader.get_single_data()
    except (AttributeError, LookupError, TypeError, OverflowError) as error:  # PyYAML's own, as of "!!int ''"
        raise ValueError(f"a value that is none: {reason(error)}") from error
    finally:
        loader.dispose()


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not of the form key.sub=value")
    place: Any = content
    *parents, last = key.split(".")
    for parent in parents:
        if isinstance(place, list) and _is_index(parent) and int(parent) < len(place):
            place = place[int(parent)]
            continue
        if not isinstance(place, dict):
            raise UserError(f"override {override!r}: {parent} is inside a value that has no keys")
        if not isinstance(place.get(parent), dict | list):
            place[parent] = {}
        place = place[parent]
    try:
        parsed = _parsed(value)
    except (yaml.YAMLError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"override {override!r} has a value that is no YAML ({why})") from error
    if isinstance(place, list):
        if not _is_index(last) or int(last) >= len(place):
            raise UserError(f"override {override!r}: a list is indexed by 0 to {len(place) - 1}")
        place[int(last)] = parsed
    elif isinstance(place, dict):
        place[last] = parsed
    else:
        raise UserError(f"override {override!r}: {key} is inside a value that has no keys")


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdigit()


def validation_message(error: ValidationError, kind: type[Strict], prefix: str = "") -> str:
    """The first of pydantic's complaints as one line: the key, the value, the remedy."""
    order = ("extra_forbidden", "invalid_key")  # a misspelt key explains what else is wrong
    first = min(error.errors(), key=lambda one: one["type"] not in order)
    known, loc = _known(kind, first["loc"])
    key = ".".join(str(part) for part in ([prefix] if prefix else []) + loc)
    if first["type"] in order:
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]}?" if near else f"known here are {', '.join(known) or '(none)'}"
        return f"config key {key} is unknown; {remedy}"
    if first["type"] == "missing":
        return f"config key {key} is missing; add it (see configs/ for examples)"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message
    message = f"{message[0].lower()}{message[1:]}"
    if len(kinds := [tag for tag in map(_tag, _fields_at(kind, loc)) if tag]) > 1:
        message = f"it needs a kind, one of {', '.join(kinds)}"
    return f"config key {key} is {quoted(first['input'])}: {message}"


def _fields_at(kind: type[Strict], loc: Sequence[int | str]) -> list[type[Strict]]:
    """The config classes that the value at loc may be."""
    choices = [kind]
    keyed = False
    for part in loc:
        if keyed:  # a name that the user chose
            keyed = False
            continue
        fields = [c.model_fields[str(part)].annotation for c in choices if str(part) in c.model_fields]
        keyed = any(get_origin(annotation) is dict for annotation in fields)
        choices = [model for annotation in fields for model in _models(annotation)]
    return choices


def _known(kind: type[Strict], loc: Sequence[int | str]) -> tuple[list[str], list[int | str]]:
    """The keys of the object that loc ends in, and loc without pydantic's tags of union members."""
    path: list[int | str] = []
    choices: list[type[Strict]] = [kind]
    inside = keyed = False  # in a value that has no keys, or in a mapping of models by name
    for part in loc[:-1]:
        tagged = [c for c in choices if len(choices) > 1 and _tag(c) == part]
        if tagged:
            choices = tagged
            continue
        fields = [c.model_fields[str(part)].annotation for c in choices if str(part) in c.model_fields]
        if keyed:  # a name that the user chose
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
    field = kind.model_fields.get("kind")
    return get_args(field.annotation)[0] if field is not None else None


def _models(annotation: Any) -> list[type[Strict]]:
    """The config classes in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return [annotation]
    if get_origin(annotation) in (Annotated, Union, types.UnionType, list, dict):
        return [model for inner in get_args(annotation) for model in _models(inner)]
    return []
