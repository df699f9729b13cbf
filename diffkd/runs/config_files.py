"""Config files read into the typed objects of a run, and written back in full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from diffkd import methods
from diffkd.errors import UserError
from diffkd.io.config import Strict, read_yaml, validation_message
from diffkd.io.text import quoted, reason
from diffkd.methods.base import Method


def methods_of(given: Any) -> list[Method]:
    """{"name": ..., fields} -> the Method, or a list of such. Raises UserError."""
    if isinstance(given, list) and not any(isinstance(one, list) for one in given):
        return [methods_of(one)[0] for one in given]
    if isinstance(given, Method):
        return [given]
    if not isinstance(given, Mapping):
        raise UserError(
            f"method {quoted(given)} is no mapping with a name; use one of {', '.join(methods.names())}"
        )
    kind = methods.find(str(given.get("name", "progressive")))
    try:
        return [kind.model_validate({key: value for key, value in given.items() if key != "name"})]
    except ValidationError as error:
        raise UserError(validation_message(error, kind, "method")) from error


def name_of(method: Method) -> str:
    """As a config has it."""
    return type(method).__module__.removeprefix("diffkd.methods.")


def check_kind(method: Method, kind: type[Any], what: str) -> None:
    """Raises UserError for a method of other models than the run's."""
    if method.kind is not kind:
        fitting = [name for name in methods.names() if methods.find(name).kind is kind]
        raise UserError(
            f"method {name_of(method)} distils a {method.kind.__name__.lower()}, and this run is of {what}; "
            f"use one of {', '.join(fitting)}"
        )


Config = TypeVar("Config", bound=Strict)


def load(path: Path, kind: type[Config], overrides: Sequence[str] = ()) -> Config:
    """A config file with `key.sub=value` overrides.

    Raises UserError, which for an unknown key names the nearest known one.
    """
    content = read_yaml(path, overrides)
    teacher = content.get("teacher")
    if isinstance(teacher, dict) and isinstance(teacher.get("train"), str):
        try:
            named = (path.parent / teacher["train"]).resolve()
        except ValueError as error:
            raise UserError(
                f"config key teacher.train is {quoted(teacher['train'])}, no path ({reason(error)})"
            ) from error
        teacher["train"] = str(named)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise UserError(validation_message(error, kind)) from error


def resolved(config: Strict) -> dict[str, Any]:
    """The config as plain data, every default written out; the run folder keeps it."""
    content = config.model_dump(mode="json")
    given = getattr(config, "method", None)
    if isinstance(given, Method):
        content["method"] = {"name": name_of(given), **content["method"]}
    elif given is not None:
        pairs = zip(given, content["method"], strict=True)
        content["method"] = [{"name": name_of(one), **fields} for one, fields in pairs]
    return content
