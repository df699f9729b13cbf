"""User code by name: methods, feature networks and classifiers of the user's own.

A name is a module's that defines one of them (`my_method`, `my_lab.method`), `module.Class`, or a file
(`./my_method.py`). Modules are looked for beside the config that names them, in the current folder, and where
Python finds installed ones. Only names from a config or a command line get here: to import a module runs its
code, and a name found in any other file may not be the user's.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from diffkd.errors import UserError
from diffkd.io.places import expanded
from diffkd.io.text import log, quoted, reason

announced: set[str] = set()
homes: dict[str, Path] = {}  # the folders of own top-level modules that were named and are not installed
WORD = r"[\w-]{1,100}"  # a part of a module's name: Python itself takes hyphens in those of files
looked: dict[str, list[Path]] = {}  # the folders where a module was looked for, for the error
_beside: ContextVar[Path | None] = ContextVar("beside", default=None)


@contextmanager
def beside(folder: Path) -> Iterator[None]:
    """While a config in `folder` is read: its names mean modules there first."""
    token = _beside.set(Path(os.path.realpath(folder)))
    try:
        yield
    finally:
        _beside.reset(token)


def in_config(name: str, builtin: Collection[str]) -> str:
    """`locate` for a field of a config; what is not read from a config file stays as it is."""
    return name if _beside.get() is None else locate(name, builtin)


def locate(name: str, builtin: Collection[str] = ()) -> str:
    """The name as Python would have it, its module found if it is the user's own; nothing is imported.

    Raises UserError for a file that is not there, and for a module that has the name of another one.
    """
    if name in builtin:
        return name
    importlib.invalidate_caches()  # the file may have been written a moment ago
    if name.endswith(".py") or os.sep in name:
        return _located_file(name, builtin)
    top, dotted, _ = name.partition(".")
    if not re.fullmatch(WORD, top) or (top in homes and _beside.get() is None):
        return name
    if _beside.get() is not None or top not in looked:
        looked[top] = _places()
    for place in looked[top]:
        spec = PathFinder.find_spec(top, [str(place)])
        if spec is not None and (_has_code(spec) or (dotted and _installed(top) is None)):
            _bind(top, place, Path(spec.origin or place / top))
            break
    return name


def reading_config() -> bool:
    """Whether a config file is being read."""
    return _beside.get() is not None


def find_file(name: str) -> Path:
    """The file of that name beside the config that is read, or in the current folder, as an absolute path.

    Raises UserError where there is none.
    """
    tried = [(place / expanded(name)).absolute() for place in _places()]
    file = next((path for path in tried if os.path.isfile(path)), None)
    if file is None:
        raise UserError(f"there is no file {' or '.join(map(str, dict.fromkeys(tried)))}; give another name")
    return file


def _located_file(name: str, builtin: Collection[str]) -> str:
    file = find_file(name)
    if file.suffix != ".py" or not re.fullmatch(WORD, file.stem):
        raise UserError(f"{file} cannot be imported: its name is not one of a module; rename it")
    if file.stem in builtin:
        raise UserError(f"{file} has the name of one of diffkd's own; rename it")
    _bind(file.stem, file.parent, file)
    return file.stem


def import_own(name: str, base: type[Any], what: str, builtin: Sequence[str]) -> Any:
    """What a name stands for: the one subclass of `base` that its module defines, or what it names in it.

    Raises UserError, which says what was tried, or how the module's own code failed.
    """
    module, attribute = _imported(locate(name, builtin), name, what, builtin)
    defined = classes_of(module, base)
    if attribute:
        if not hasattr(module, attribute):
            has = f"; it has {', '.join(defined)}" if defined else ""
            raise UserError(f"{what} {name!r} is unknown: {_where(module)} has no {attribute}{has}")
        return getattr(module, attribute)
    if len(defined) == 1:
        return next(iter(defined.values()))
    many = f"several ({', '.join(defined)}); name one, as {module.__name__}.{next(reversed(defined), '')}"
    none = f"none, a subclass of {base.__module__}.{base.__qualname__}; add one"
    raise UserError(f"{what} {name!r}: {_where(module)} defines {many if defined else none}")


def classes_of(module: ModuleType, base: type[Any]) -> dict[str, type[Any]]:
    """The public, concrete subclasses of `base` that a module, or a package's own modules, define."""
    prefix = f"{module.__name__}."
    return {
        value.__name__: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base) and value is not base
        if f"{value.__module__}.".startswith(prefix) and not name.startswith("_")
        if not inspect.isabstract(value)
    }


def failure(error: BaseException) -> str:
    """An exception of the user's code in one line: its type and message, and the user's own line."""
    text = reason(error)
    said = type(error).__name__ + (f": {text}" if text != type(error).__name__ else "")
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    inside = [f for f in frames if any(Path(f.filename).is_relative_to(home) for home in homes.values())]
    own = inside or [f for f in frames if not f.filename.startswith(str(Path(__file__).parents[1]))]
    return said + (f" ({own[-1].filename}, line {own[-1].lineno})" if own else "")


def _imported(module_name: str, name: str, what: str, builtin: Sequence[str]) -> tuple[ModuleType, str]:
    """The module, and what is named in it, "" for nothing."""
    parent, _, attribute = module_name.rpartition(".")
    missing = module_name
    for candidate, rest in ((module_name, ""), (parent, attribute)):
        if not re.fullmatch(rf"{WORD}(\.{WORD})*", candidate):
            continue
        try:
            module = importlib.import_module(candidate)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever the user's code raises; SystemExit, if it is a script
            absent = error.name if isinstance(error, ModuleNotFoundError) else None
            if absent and f"{candidate}.".startswith(f"{absent}."):
                missing = absent
                continue
            raise UserError(f"{what} {name!r}: its import failed with {failure(error)}") from error
        if module.__name__ not in announced:
            announced.add(module.__name__)
            log.warning("running user code: module %s", _where(module))
        return module, rest
    places = " or ".join(map(str, looked.get(missing, [])))
    raise UserError(
        f"{what} {quoted(name)} is unknown; use {', '.join(builtin)}, or code of your own: there is no "
        f"module {missing[:100]}{f', neither installed nor in {places}' if places else ''}"
    )


def _where(module: ModuleType) -> str:
    return f"{module.__name__} ({getattr(module, '__file__', None) or 'no file'})"


# where modules are


def _places() -> list[Path]:
    """The config's folder, and the current one."""
    config = _beside.get()
    places = [config] if config else []
    with suppress(OSError):  # a current folder that was removed
        places.append(Path.cwd())
    return list(dict.fromkeys(places))


def _bind(top: str, folder: Path, file: Path) -> None:
    """Lets Python find a top-level module in a folder. Raises UserError where the name means another one
    already: neither is to be run for the other."""
    if homes.get(top) == folder:
        return
    known = _installed(top)
    if top in homes and known is None:
        known = PathFinder.find_spec(top, [str(homes[top])])
    if known is None:
        homes[top] = folder
    elif not (known.origin and os.path.exists(known.origin) and os.path.samefile(known.origin, file)):
        raise UserError(f"{file} has the name of another module, {known.origin or top}; rename it")


def _installed(top: str) -> ModuleSpec | None:
    """How Python finds a module without the help of this one; None for a folder without code."""
    loaded = sys.modules.get(top)
    if loaded is not None and top not in homes:
        return loaded.__spec__ or ModuleSpec(top, None, origin=getattr(loaded, "__file__", None))
    finders = (finder for finder in sys.meta_path if finder is not _finder and hasattr(finder, "find_spec"))
    return next((spec for finder in finders if _has_code(spec := finder.find_spec(top, None))), None)


def _has_code(spec: ModuleSpec | None) -> bool:
    """False for a folder without an __init__.py: of images, say."""
    return spec is not None and spec.origin is not None


class _Beside(MetaPathFinder):
    """Finds own modules, and what they import from beside themselves, last of all: nothing installed is
    replaced, and no folder of images is taken for a package."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if path is not None:
            return None  # inside a package, which says itself where its modules are
        if name in homes:
            return PathFinder.find_spec(name, [str(homes[name])])
        folders = dict.fromkeys(map(str, homes.values()))
        return next((spec for f in folders if _has_code(spec := PathFinder.find_spec(name, [f]))), None)


_finder = _Beside()
sys.meta_path.append(_finder)
