"""Numbers that others can reproduce: feature networks, one metric a file, evaluations with their protocol."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffkd.metrics.base import Metric

_HOMES = {
    "frechet_distance": "frechet",
    "Statistics": "statistics",
    "kernel_distance": "kid",
    "cmmd": "clip_mmd",
    "inception_score": "score",
    "precision_recall": "prdc",
    "density_coverage": "prdc",
    "frechet_infinity": "fd_infinity",
    "InceptionV3": "features.inception",
    "DINOv2": "features.dinov2",
    "CLIP": "features.clip",
    "CLIPTextImage": "features.clip_score",
    "DigitsFeatures": "features.digits",
    "Evaluation": "evaluation.config",
    "Evaluator": "evaluation.evaluator",
}
__all__ = list(_HOMES)  # noqa: PLE0604
_FIRST = (
    "fid",
    "fd_inf",
    "class_fid",
    "fd_dino",
    "kid",
    "cmmd",
    "is",
    "prdc",
    "clip_score",
    "prompt_accuracy",
    "agreement",
)  # in tables; any other follows


@cache
def kinds() -> dict[str, type[Metric]]:
    """Every metric by its name, in the order of tables: the subclasses of Metric in this folder's files."""
    from diffkd.metrics.base import Metric

    found: dict[str, type[Metric]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            own = isinstance(value, type) and value.__module__ == module.__name__
            if own and issubclass(value, Metric) and value is not Metric:
                found[value.name] = value
    order = [*_FIRST, *sorted(found.keys() - set(_FIRST))]
    return {name: found[name] for name in order}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise  # of a package that the module needs
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
