"""Distillation algorithms, one file each, found by the name of their file."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from diffkd.errors import UserError
from diffkd.io.plugins import import_user_module
from diffkd.methods.base import Method

CONTRACT = "base"  # the one file here that does not define a method


def find(name: str) -> type[Method]:
    """The Method in diffkd/methods/<name>.py, or in the user's own module for a dotted path."""
    module_name = name if "." in name else f"{__name__}.{name}"
    try:
        if name == CONTRACT:
            raise ValueError("the contract itself")
        module = import_user_module(name) if "." in name else importlib.import_module(module_name)
    except (ModuleNotFoundError, TypeError, ValueError) as error:
        if isinstance(error, ModuleNotFoundError) and not module_name.startswith(error.name or "\0"):
            raise  # the method's file was found, and imports a module that is missing
        raise UserError(
            f"method {name!r} is unknown; use one of {', '.join(names())}, or the dotted path of your own"
        ) from error
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and value is not Method
        and value.__module__ == module_name
    ]
    if len(own) != 1:
        raise UserError(
            f"module {module_name} defines {len(own)} methods; a method's file defines one (method {name!r})"
        )
    return own[0]


def names() -> list[str]:
    """The names of the built-in methods, which are those of their files."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != CONTRACT)


def __getattr__(name: str) -> Any:
    """Makes `diffkd.methods.progressive` work without importing it first."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
