"""The Fréchet distance by the arithmetic of other tools, for their very numbers."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from diffkd.metrics.base import FeatureSet

Tool = Literal["pytorch-fid", "clean-fid", "torch-fidelity", "edm", "adm"]
TOOLS: tuple[str, ...] = get_args(Tool)
SINGLE_MEAN = ("clean-fid", "torch-fidelity", "adm")  # tools whose mean is float32, as their features


def tool_distance(tool: str, one: FeatureSet, two: FeatureSet) -> float:
    """As the tool computes it, from features where they are stored, else from the statistics as they are."""
    return rooted_distance(_mean(tool, one), _sigma(one), _mean(tool, two), _sigma(two))


def rooted_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|² + tr (sigma1 + sigma2 - 2 (sigma1 sigma2)^½), the root by the eigenvalues of the product.

    mu: (d,), sigma: (d, d). With no more samples than features the product is singular: eigenvalues that
    should be 0 are rounding errors, and the root of each counts, as in the tools. The sum may be below 0, as
    theirs. `frechet.distance` is without that error.
    """
    apart = mu1 - mu2
    roots = np.sqrt(np.linalg.eigvals(sigma1 @ sigma2).astype(np.complex128)).real
    return float(apart @ apart + np.trace(sigma1) + np.trace(sigma2) - 2 * roots.sum())


def _mean(tool: str, of: FeatureSet) -> np.ndarray:
    if tool in SINGLE_MEAN and of.stored is not None:
        return single_mean(of.stored)
    mean: np.ndarray = of.statistics.mu.cpu().numpy()
    return mean


def single_mean(features: Tensor) -> np.ndarray:
    """(N, d) -> (d,) in float32, by NumPy, which adds one row after another."""
    mean: np.ndarray = features.to("cpu", torch.float32).numpy().mean(0)
    return mean


def _sigma(of: FeatureSet) -> np.ndarray:
    """With divisor N - 1 in float64, in which all of the tools agree."""
    sigma: np.ndarray = of.statistics.sigma.cpu().numpy()
    return sigma
