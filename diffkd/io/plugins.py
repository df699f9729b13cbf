"""The user's own code, imported by dotted path: methods, feature networks, classifiers."""

from __future__ import annotations

import importlib
from types import ModuleType

from diffkd.io.text import log

announced: set[str] = set()


def import_user_module(name: str) -> ModuleType:
    """Imports a module of the user's own, which runs its code, and says so once.

    Only for names from a config or a command line. A name in a file that merely was there is not the user's.
    """
    module = importlib.import_module(name)
    if name not in announced:
        announced.add(name)
        log.warning("running code of yours: module %s (%s)", name, getattr(module, "__file__", "no file"))
    return module
