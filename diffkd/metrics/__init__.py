"""Measuring: feature networks, distances between sets of images, and models measured with their protocol."""

from __future__ import annotations

from typing import Any

_HOMES = {
    "frechet_distance": "frechet",
    "Statistics": "statistics",
    "kernel_distance": "kernel",
    "cmmd": "kernel",
    "inception_score": "score",
    "precision_recall": "prdc",
    "density_coverage": "prdc",
    "frechet_infinity": "sampling_error",
    "InceptionV3": "features.inception",
    "DINOv2": "features.dinov2",
    "CLIP": "features.clip",
    "DigitsFeatures": "features.digits",
    "Evaluation": "evaluation.config",
    "Evaluator": "evaluation.evaluator",
}
__all__ = list(_HOMES)  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Public names are imported when first used."""
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise  # of a package that the module needs
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
