"""Pure functions of tensors: weightings over the noise level and distances."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["truncated_snr", "snr", "snr_plus_one", "min_snr", "constant"]


def weight(name: Weighting, snr: Tensor, *, gamma: float = 5.0) -> Tensor:
    """Weight of a squared error in x0 at signal-to-noise ratio `snr`, shaped like snr.

    "snr" is the error in eps, "snr_plus_one" the error in v, "constant" the error in x0 itself;
    "truncated_snr" = max(snr, 1) keeps the largest of eps and x0 (Salimans & Ho 2022, section 4); "min_snr" =
    min(snr, gamma) is Hang et al. 2023, section 3.4.
    """
    if name == "truncated_snr":
        return snr.clamp(min=1)
    if name == "snr":
        return snr
    if name == "snr_plus_one":
        return snr + 1
    if name == "min_snr":
        return snr.clamp(max=gamma)
    return torch.ones_like(snr)


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference per example: two (B, ...) -> (B,), whatever the size of an image."""
    return (x - y).square().flatten(1).mean(1)
