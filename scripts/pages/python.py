"""The reference of the public names in Python: signatures and docstrings, read by mkdocstrings."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType

import diffkd

INTRO = """# Python

What `import diffkd` gives, imported when it is first used. Shapes, units, errors and sources are in each
docstring. Tensors of states are (B, C, H, W), times (B,) in [0, 1], where 0 is data and 1 is noise.
"""
ENTRY = """::: {home}
    options:
      heading: "{name}"
      toc_label: "{name}"
      heading_level: 3
"""


def page() -> str:
    """The whole page, in Markdown."""
    parts = [INTRO]
    parts.append("## diffkd")
    for name, home in names():
        parts.append(ENTRY.format(home=home, name=name))
    for name, module in modules():
        parts += [f"## diffkd.{name} {{ #{name} }}", inspect.cleandoc(module.__doc__ or "")]
        for inner, home in public(module):
            parts.append(ENTRY.format(home=home, name=f"diffkd.{name}.{inner}"))
    return "\n\n".join(parts) + "\n"


def names() -> Iterator[tuple[str, str]]:
    """The functions and classes at the top, each with where it is defined."""
    for name in diffkd._NAMES:
        yield f"diffkd.{name}", home_of(getattr(diffkd, name))


def modules() -> Iterator[tuple[str, ModuleType]]:
    for name, home in diffkd._MODULES.items():
        yield name, importlib.import_module(home)


def public(module: ModuleType) -> Iterator[tuple[str, str]]:
    """The functions and classes of a module: those it names in `__all__`, or else its own."""
    listed = getattr(module, "__all__", None)
    for name in listed or vars(module):
        value = getattr(module, name)
        if name.startswith("_") or not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        if listed or value.__module__ == module.__name__:
            yield name, home_of(value)


def home_of(value: object) -> str:
    """The dotted name of where a function or a class is defined."""
    return f"{value.__module__}.{value.__qualname__}"  # type: ignore[attr-defined]
