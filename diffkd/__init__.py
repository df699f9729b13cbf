"""diffkd distils diffusion models: many denoising steps into few, as stock diffusers pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Denoiser", "generate", "load"]

if TYPE_CHECKING:
    from diffkd.denoiser import Denoiser
    from diffkd.generation import generate
    from diffkd.models import load

_HOMES = {"Denoiser": "diffkd.denoiser", "generate": "diffkd.generation", "load": "diffkd.models"}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used: `diffkd --help` needs no torch."""
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    try:
        return importlib.import_module(f"diffkd.{name}")
    except ModuleNotFoundError:
        raise AttributeError(f"module 'diffkd' has no attribute {name!r}") from None
