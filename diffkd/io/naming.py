"""What a setting is called where the user at hand gives it: an option of a command, a key of a config, or an
argument in Python. Messages that several of them can reach ask here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Surface = Literal["python", "command", "config"]

OPTIONS = {  # of the commands; any other is called as the last part of its key
    "evaluation.resize": "--feature-resize",
    "evaluation.labels": "--classes",
    "evaluation.dinov2_weights": "--dino-weights",
    "data.size": "--resize",
}
_surface: Surface = "python"  # of the whole process: images are decoded in threads
_data = "data"


def speak(surface: Surface) -> None:
    """From here on settings are called as they are there."""
    global _surface
    _surface = surface


@contextmanager
def spoken(surface: Surface) -> Iterator[None]:
    """While something goes on: settings are called as they are there."""
    before = _surface
    speak(surface)
    try:
        yield
    finally:
        speak(before)


@contextmanager
def reference() -> Iterator[None]:
    """While the images of a reference are opened: in a config they are not `data`, but have the same keys."""
    global _data
    _data = "evaluation.reference"
    try:
        yield
    finally:
        _data = "data"


def in_config() -> bool:
    return _surface == "config"


def option(text: str, key: str) -> str:
    """The text with the name of a setting in it; "" on a command line, which has no option for it."""
    return "" if _surface == "command" else text.format(called(key))


def called(key: str) -> str:
    """The name of a setting. key: as in a config, such as evaluation.weights, data.size, or steps."""
    last = key.rpartition(".")[2]
    if _surface == "python":
        return last
    if _surface == "command":
        return OPTIONS.get(key) or f"--{last.replace('_', '-')}"
    return f"{_data}.{last}" if key.startswith("data.") else key
