"""The feature networks that an evaluation needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from diffkd.metrics import features
from diffkd.metrics.base import MAIN, Metric
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.evaluation.reference import Reference


class Networks(NamedTuple):
    """By key: MAIN, or the name that a metric gives its own. descriptions: what a protocol says of each."""

    modules: dict[str, nn.Module]
    descriptions: dict[str, dict[str, Any]]


def load(config: Evaluation, chosen: list[Metric]) -> Networks:
    """All of them, the main one first. Raises UserError where one is missing or lacks what a metric needs."""
    modules = {
        MAIN: features.load(config.features, weights=config.weights, resize=config.resize, dtype=config.dtype)
    }
    for metric in chosen:
        if metric.network == MAIN:
            metric.check(modules[MAIN], config.features)
        elif metric.network not in modules:
            modules[metric.network] = features.load(metric.network, weights=metric.weights())
    names = {key: config.features if key == MAIN else key for key in modules}
    return Networks(modules, {key: features.describe(names[key], module) for key, module in modules.items()})


def of_reference(chosen: list[Metric]) -> set[str]:
    """Keys of the networks that the images of the reference go through."""
    return {MAIN} | {metric.network for metric in chosen if metric.with_reference}


def stored_of_reference(chosen: list[Metric]) -> set[str]:
    """Keys of the networks whose every feature of the reference is needed."""
    return {metric.network for metric in chosen if metric.stores_reference}


def preferred_of_reference(chosen: list[Metric]) -> set[str]:
    """The same where there are images, or features, to have them from."""
    return {metric.network for metric in chosen if metric.prefers_reference}


def stored_of_images(chosen: list[Metric]) -> set[str]:
    """The same of the images that are measured."""
    return {metric.network for metric in chosen if metric.stores_images}


def check(config: Evaluation, reference: Reference | None = None) -> None:
    """Raises UserError where a feature network or the reference cannot give what the metrics need."""
    chosen = config.chosen()
    descriptions: Mapping[str, Any] = load(config, chosen).descriptions
    if reference is not None and reference.is_there:
        needed = of_reference(chosen)
        described = {key: found for key, found in descriptions.items() if key in needed}
        reference.require(described, stored_of_reference(chosen), config.allow_mismatch)
