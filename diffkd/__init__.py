"""diffkd distils diffusion models: many denoising steps into few, as stock diffusers pipelines."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from diffkd import methods, metrics
    from diffkd.core import classifier, losses, samplers, schedules
    from diffkd.core import guidance_kinds as guidance
    from diffkd.core.denoiser import Denoiser
    from diffkd.errors import UserError
    from diffkd.generation.generator import generate
    from diffkd.models import students
    from diffkd.models.loading import load
    from diffkd.runs.callbacks import Callback
    from diffkd.runs.classification import networks as classifiers
    from diffkd.runs.distilled import distill
    from diffkd.runs.evaluate import evaluate
    from diffkd.runs.saving import save
    from diffkd.runs.stats import compute_statistics

_NAMES = {
    "Denoiser": "diffkd.core.denoiser", "generate": "diffkd.generation.generator",
    "load": "diffkd.models.loading", "evaluate": "diffkd.runs.evaluate", "distill": "diffkd.runs.distilled",
    "compute_statistics": "diffkd.runs.stats", "save": "diffkd.runs.saving",
    "Callback": "diffkd.runs.callbacks", "UserError": "diffkd.errors",
}  # fmt: skip
_MODULES = {
    "schedules": "diffkd.core.schedules", "samplers": "diffkd.core.samplers", "losses": "diffkd.core.losses",
    "classifier": "diffkd.core.classifier", "students": "diffkd.models.students", "methods": "diffkd.methods",
    "classifiers": "diffkd.runs.classification.networks", "metrics": "diffkd.metrics",
    "guidance": "diffkd.core.guidance_kinds",
}  # fmt: skip
__all__ = [
    "Callback", "Denoiser", "UserError", "classifier", "classifiers", "compute_statistics", "distill",
    "evaluate", "generate", "guidance", "load", "losses", "methods", "metrics", "samplers", "save",
    "schedules", "students",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Public names, whatever room they live in, imported when first used: `diffkd --help` needs no torch."""
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module 'diffkd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_NAMES, *_MODULES, "__version__"])
