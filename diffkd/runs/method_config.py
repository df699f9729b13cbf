"""Methods in a config: a mapping of the name and the method's fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, ValidationError

from diffkd import methods
from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.io.config import validation_message
from diffkd.io.text import quoted
from diffkd.methods.base import Method


def parse_method(given: Any, kind: type[Any]) -> Method:
    """The method of a config, which has to distil models of that kind. Raises UserError."""
    if not isinstance(given, Method):
        given = _method_of(given)
    if given.kind is not kind:
        fitting = [name for name in methods.names() if methods.find(name).kind is kind]
        raise UserError(
            f"method {method_name(given)} distils a {given.kind.__name__.lower()}, and this run distils a "
            f"{kind.__name__.lower()}; use one of {', '.join(fitting)}"
        )
    return given


def _method_of(given: Any) -> Method:
    if not isinstance(given, Mapping):
        raise UserError(
            f"method {quoted(given)} is not a mapping with a name; use one of {', '.join(methods.names())}"
        )
    kind = methods.find(str(given.get("name", "progressive")))
    try:
        return kind.model_validate({key: value for key, value in given.items() if key != "name"})
    except ValidationError as error:
        raise UserError(validation_message(error, kind, "method")) from error


def method_name(method: Method) -> str:
    """The name that a config gives it."""
    return methods.name_of(type(method))


def method_config(method: Method) -> dict[str, Any]:
    """The method as a config writes it, every default written out."""
    return {"name": method_name(method), **method.model_dump(mode="json")}


DenoiserMethod = Annotated[
    Method, BeforeValidator(lambda given: parse_method(given, Denoiser)), PlainSerializer(method_config)
]
