"""Distillation algorithms, one file each, found by the name of their file."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import Any

from diffkd.errors import UserError
from diffkd.io import plugins
from diffkd.methods.base import Method

SHARED = ("base", "settings")  # the files here that define no method


def find(name: str) -> type[Method]:
    """The Method in diffkd/methods/<name>.py, or one of the user's own, as `plugins` reads its name."""
    builtin = names()
    if name not in builtin:
        kind: type[Method] = plugins.import_own(name, Method, "method", builtin)
        if not (isinstance(kind, type) and issubclass(kind, Method)):
            raise UserError(
                f"method {name!r} is not a subclass of diffkd.methods.base.Method; name one that is"
            )
        return kind
    module = importlib.import_module(f"{__name__}.{name}")
    defined = list(plugins.classes_of(module, Method).values())
    if len(defined) != 1:
        raise UserError(f"{module.__file__} defines {len(defined)} methods; a method's file defines one")
    return defined[0]


def name_of(kind: type[Method]) -> str:
    """The name that a config gives it: its module's, if that defines no other method."""
    module = kind.__module__
    if module.startswith(f"{__name__}.") or len(plugins.classes_of(sys.modules[module], Method)) == 1:
        return module.removeprefix(f"{__name__}.")
    return f"{module}.{kind.__qualname__}"


def names() -> list[str]:
    """The names of the built-in methods, which are those of their files."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in SHARED)


def __getattr__(name: str) -> Any:
    """Makes `diffkd.methods.progressive` work without importing it first."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
