"""Where two nested mappings differ."""

from __future__ import annotations

from typing import Any


def changes(before: Any, now: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two nested mappings differ: {"key.sub": (before, now)}."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        inner = (changes(before.get(k), now.get(k), f"{where}.{k}".lstrip(".")) for k in keys)
        return {key: pair for found in inner for key, pair in found.items()}
    return {} if before == now else {where: (before, now)}


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """The same, each as "key was x, now y"."""
    return [f"{key} was {was}, now {value}" for key, (was, value) in changes(before, now, where).items()]
