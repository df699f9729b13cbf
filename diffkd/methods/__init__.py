"""Distillation algorithms, one file each; `diffkd.method.find` finds them by name."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`diffkd.methods.progressive` without an import of its own."""
    import importlib

    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
