"""User code, imported by dotted path: methods, feature networks, classifiers."""

from __future__ import annotations

import importlib
from types import ModuleType

from diffkd.io.text import log

announced: set[str] = set()


def import_user_module(name: str) -> ModuleType:
    """Imports a module of the user's, which runs its code, and logs that once.

    Only for names from a config or a command line: a name found in any other file may not be the user's.
    """
    module = importlib.import_module(name)
    if name not in announced:
        announced.add(name)
        log.warning("running user code: module %s (%s)", name, getattr(module, "__file__", "no file"))
    return module
