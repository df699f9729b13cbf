"""The Fréchet distance between two Gaussians: the formula of FID (Heusel et al. 2017)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffkd.errors import UserError

SYMMETRY = 1e-6  # of the largest entry or eigenvalue: beyond it a matrix is not a covariance
LOW = 4  # features for each rank of a matrix whose rank is low
WELL_CONDITIONED = 1e-10  # ratio of Cholesky pivots above which that factor is as exact as the eigenvectors


class Gaussian(NamedTuple):
    """mu: (d,). factor: (d, r) with sigma = factor factorᵀ. trace: of sigma. All float64."""

    mu: Tensor
    factor: Tensor
    trace: Tensor


def frechet_distance(mu1: Any, sigma1: Any, mu2: Any, sigma2: Any) -> float:
    """|mu1 - mu2|² + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^½), in float64.

    mu: (d,), sigma: (d, d), tensors or arrays, of any rank: exact with fewer samples than features. Raises
    UserError for shapes that do not fit, values that are not finite, and matrices that are not symmetric.
    """
    one, two = gaussian(mu1, sigma1), gaussian(mu2, sigma2)
    if one.mu.shape != two.mu.shape:
        raise UserError(
            f"the distance of {len(one.mu)} features from {len(two.mu)} is undefined; "
            "use one feature network for both"
        )
    return distance(one, two)


def distance(one: Gaussian, two: Gaussian) -> float:
    """The same from Gaussians whose factors are known.

    tr (sigma1 sigma2)^½ is the sum of the singular values of factor1ᵀ factor2: no root of a matrix is taken,
    and a singular value that should be 0 is off by rounding, not by the root of it.
    """
    cross = torch.linalg.svdvals(one.factor.T @ two.factor.to(one.factor.device)).sum()
    shift = (one.mu - two.mu.to(one.mu.device)).square().sum()
    return max(float(shift + one.trace + two.trace.to(one.trace.device) - 2 * cross), 0.0)


def gaussian(mu: Any, sigma: Any, name: str = "the statistics") -> Gaussian:
    """Checks mu and sigma and factors sigma."""
    mu, sigma = checked(mu, sigma, name)
    return Gaussian(mu, _factor(sigma, name), sigma.trace())


def checked(mu: Any, sigma: Any, name: str = "the statistics") -> tuple[Tensor, Tensor]:
    """mu (d,) and sigma (d, d) as float64 tensors. Raises UserError, naming `name`, if they are not."""
    mu, sigma = _float64(mu, name), _float64(sigma, name)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or len(mu) == 0:
        raise UserError(
            f"{name}: mu of shape {tuple(mu.shape)} and sigma of shape {tuple(sigma.shape)} do not fit; "
            "they must be (d,) and (d, d)"
        )
    ends = torch.stack(sigma.aminmax())
    if not (mu.isfinite().all() and ends.isfinite().all()):
        raise UserError(f"{name}: mu or sigma has values that are not finite; compute them again")
    if torch.equal(sigma, sigma.T):
        return mu, sigma
    if (sigma - sigma.T).abs().max() > SYMMETRY * ends.abs().max():
        raise UserError(f"{name}: sigma is not symmetric, so it is not a covariance; compute it again")
    return mu, (sigma + sigma.T) / 2


def _float64(values: Any, name: str) -> Tensor:
    if isinstance(values, Tensor):
        return values.double()
    array = np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise UserError(f"{name}: mu or sigma is of type {array.dtype}; both must be real numbers")
    return torch.from_numpy(array.astype(np.float64))  # a copy, in this machine's byte order


def _factor(sigma: Tensor, name: str) -> Tensor:
    """F with F Fᵀ = sigma: Cholesky's where sigma is well conditioned or of low rank, else by eigenvectors.

    Eigenvalues that are rounding errors are dropped: their roots would not be.
    """
    leading = len(sigma) // LOW + 1  # of a matrix of lower rank this part is singular, and soon tried
    failed = torch.linalg.cholesky_ex(sigma[:leading, :leading]).info
    if not failed:
        lower, failed = torch.linalg.cholesky_ex(sigma)
    if not failed:
        pivots = lower.diagonal().square()
        if pivots.min() > WELL_CONDITIONED * pivots.max():
            return lower
    narrow = _low_rank(sigma)
    if narrow is not None:
        return narrow
    values, vectors = torch.linalg.eigh(sigma)
    if values[0] < -SYMMETRY * values.abs().max():
        raise UserError(
            f"{name}: sigma has negative eigenvalues, so it is not a covariance; compute it again"
        )
    kept = values > values.abs().max() * len(values) * torch.finfo(torch.float64).eps
    return vectors[:, kept] * values[kept].sqrt()


def _low_rank(sigma: Tensor) -> Tensor | None:
    """F (d, r) by Cholesky's factorisation with pivots, d r² operations instead of the eigenvectors' d³.

    None for a matrix that has no such factor within rounding, or whose rank is above d / LOW.
    """
    left = sigma.diagonal().clone()  # of sigma - F Fᵀ
    rows = sigma.new_zeros(len(sigma) // LOW, len(sigma))
    rounding = len(sigma) * torch.finfo(torch.float64).eps * left.max()
    rank = 0
    while left.max() > rounding:
        if rank == len(rows):
            return None
        pivot = left.argmax()
        rows[rank] = (sigma[pivot] - rows[:rank, pivot] @ rows[:rank]) / left[pivot].sqrt()
        left -= rows[rank].square()
        left[pivot] = 0
        rank += 1
    factor = rows[:rank].T
    probe = torch.linspace(-1, 1, 4 * len(sigma), dtype=sigma.dtype, device=sigma.device).cos().view(-1, 4)
    missed = sigma @ probe - factor @ (factor.T @ probe)  # what is left off the diagonal
    return factor if missed.abs().max() <= 1e3 * rounding else None
