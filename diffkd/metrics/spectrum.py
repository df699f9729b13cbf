"""What the eigenvalues of a sample's covariance say of the population's: the expected root of a product.

Write R(y) = sum_i (y t_i)² / (1 + (y t_i)²) for the eigenvalues t of a covariance: about how many of them are
above 1 / y. For the covariances S1 and S2 of two samples of one distribution, with n1 and n2 degrees of
freedom,

    E tr (S1 S2)^½ = 2/pi ∫ ((1 - R / n1)₊ (1 - R / n2)₊)^½ R'(y) / y dy

in the limit of many dimensions. docs/decisions/0018-the-floor-of-few-images.md derives it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

STEP = 0.06  # of log y: the trapezoid rule is exact to many digits for so smooth a function
LEAST, MOST = 1e-7, 1e7  # of y times the trace, and times the largest eigenvalue: the range that is summed
ITERATIONS = 60  # of Newton's method; a few are enough


class Curve(NamedTuple):
    """R at points y, evenly spaced in log y. slope: dR / d log y. trace: the sum of the eigenvalues."""

    y: np.ndarray
    rank: np.ndarray
    slope: np.ndarray
    trace: float


def of_population(eigenvalues: np.ndarray) -> Curve:
    """From the eigenvalues themselves, (r,), all positive."""
    y = _points(eigenvalues)
    squares = (y[:, None] * eigenvalues) ** 2
    return Curve(y, (squares / (1 + squares)).sum(1), (2 * squares / (1 + squares) ** 2).sum(1),
                 float(eigenvalues.sum()))  # fmt: skip


def of_sample(eigenvalues: np.ndarray, freedom: int) -> Curve:
    """The population's, from the eigenvalues (r,) > 0 of a sample's covariance. freedom: degrees, r or more.

    A sample's eigenvalues are spread wider than the population's, and with fewer samples than features most
    are missing. Silverstein's equation z = -1/v + 1/n sum_i t_i / (1 + t_i v) ties their Stieltjes transform
    v(z) to the population's eigenvalues t. At v = iy, where z = i/y + w, the sum is n w and R(y) = -n y Im w:
    solved for w, it gives R without the t, as far as the sample tells. That is up to R = n, beyond which the
    integral above has no weight. Silverstein 1995, "Strong convergence of the empirical distribution of
    eigenvalues of large dimensional random matrices".
    """
    assert freedom >= len(eigenvalues)
    found, w = [], complex(eigenvalues.sum() / freedom)
    for y in _points(eigenvalues):
        near = complex(w.real, w.imag / math.exp(STEP))  # where R is the same
        solved = _solve(eigenvalues, freedom, y, near)
        if solved is None:
            break  # at the end of what the sample tells
        w, turn = solved
        found.append((y, -freedom * y * w.imag, -freedom * y * (w.imag + y * turn.imag)))
    y, rank, slope = np.array(found).T
    return Curve(y, rank, slope, float(eigenvalues.sum()))


def _solve(eigenvalues: np.ndarray, freedom: int, y: float, w: complex) -> tuple[complex, complex] | None:
    """(w, dw/dy) by Newton's method, from a w nearby; None where it finds none."""
    zeros, most = freedom - len(eigenvalues), eigenvalues.sum()
    for _ in range(ITERATIONS):
        p, p0 = 1 / (1 + 1j * y * (eigenvalues - w)), 1 / (1 - 1j * y * w)
        q, q0 = (eigenvalues - w) * p, -w * p0
        slope = complex((p * p).sum() + zeros * p0**2)
        if not slope:
            return None
        move = complex(q.sum() + zeros * q0) / slope
        while (w + move).imag <= -1 / y or abs(w + move) > most:  # R is below n
            move /= 2
        w += move
        if abs(move) < 1e-13 * abs(w):
            return w, -1j * complex((q * q).sum() + zeros * q0**2) / slope
    return None


def expected_root(curve: Curve, *freedoms: float) -> float:
    """E tr (S1 S2)^½ of samples with these degrees of freedom; infinite ones for the population itself."""
    kept = np.prod([np.clip(1 - curve.rank / n, 0, None) for n in freedoms], axis=0)
    values = np.sqrt(kept) * curve.slope / curve.y
    below = 2 * curve.rank[0] / curve.y[0]  # before the first point, where R is proportional to y²
    return float(2 / math.pi * (STEP * (values.sum() - values[0] / 2) + below))


def _points(eigenvalues: np.ndarray) -> np.ndarray:
    low, high = math.log(LEAST / eigenvalues.sum()), math.log(MOST / eigenvalues.max())
    return np.exp(np.arange(low, high, STEP))
