"""Mean and covariance of features: gathered in one pass, merged, written to and read from .npz."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkd.errors import UserError
from diffkd.io.files import new_file
from diffkd.io.npz import read_npz
from diffkd.metrics.frechet import Gaussian, checked, gaussian

BLOCK = 512  # rows of features that are summed at a time


class _Sums:
    """Of features (N, d), in float64: their count, their sum (d,) and that of their products (d, d)."""

    def __init__(self, like: Tensor) -> None:
        self.count, self.total = 0, torch.zeros_like(like)
        self.products = like.new_zeros(len(like), len(like))

    def add(self, features: Tensor) -> None:
        self.total += features.sum(0)
        self.products += features.T @ features
        self.count += len(features)


class Statistics:
    """Mean and covariance of features, the two things that FID compares.

    mu: (d,), sigma: (d, d) with divisor N - 1, float64 tensors. num_samples: N, None where a file does not
    say. protocol: how they came about, where `diffkd.compute_statistics` made them, else {}. The sums are
    those of torchmetrics' FID metric, in float64, but of features minus the mean of the first batch: they do
    not cancel, however far from the origin the features are.
    """

    def __init__(self, num_features: int | None = None, device: torch.device | str = "cpu") -> None:
        self.num_samples: int | None = 0
        self.protocol: dict[str, Any] = {}
        self._given: Tensor | None = None  # the covariance as it was read, to the last bit
        self._shift = torch.zeros(num_features or 0, dtype=torch.float64, device=device)
        self._sums = _Sums(self._shift)
        self._waiting: list[Tensor] = []  # features that are not in the sums yet

    @classmethod
    def of(
        cls, mu: Any, sigma: Any, num_samples: int | None = None, name: str = "the statistics"
    ) -> Statistics:
        """From a mean and a covariance that are known. name: what an error calls them."""
        mu, sigma = checked(mu, sigma, name)
        made = cls()
        made._set(mu, sigma * ((num_samples or 2) - 1), num_samples)
        made._given = sigma.clone()
        return made

    def update(self, features: Tensor | np.ndarray) -> None:
        """Adds features (B, d)."""
        features = torch.as_tensor(features)
        if features.ndim != 2:
            raise UserError(f"features of shape {tuple(features.shape)} do not fit; give (batch, features)")
        if self.num_samples is None:
            raise UserError("statistics of an unknown number of samples cannot take more of them")
        if len(features) == 0:
            return
        if self.num_features not in (0, features.shape[1]):
            raise UserError(
                f"{features.shape[1]} features do not fit the {self.num_features} of the ones before"
            )
        features = features.detach().double()
        if self.num_samples == 0:
            self._shift = features.mean(0)
            self._sums = _Sums(self._shift)
        self._given = None
        self._waiting.append(features - self._shift)
        if sum(map(len, self._waiting)) >= BLOCK:
            self._summed()
        self.num_samples += len(features)

    def merge(self, other: Statistics) -> None:
        """Adds the samples of `other`."""
        if self.num_samples is None or other.num_samples is None:
            raise UserError("statistics of an unknown number of samples cannot be merged")
        if other.num_samples == 0:
            return
        if self.num_samples == 0:
            self._set(other.mu, other._scatter(other.mu), other.num_samples)
            return
        if self.num_features != other.num_features:
            raise UserError(
                f"statistics of {self.num_features} and {other.num_features} features do not merge"
            )
        count = self.num_samples + other.num_samples
        mu = self.mu + (other.mu - self.mu) * (other.num_samples / count)
        self._set(mu, self._scatter(mu) + other._scatter(mu), count)

    def merge_across(self, add: Callable[[Tensor], Tensor]) -> None:
        """Adds up all processes, each of which must call it, with samples or without.

        add: the sum of a tensor over processes.
        """
        assert self.num_samples is not None and self.num_features
        here = self.num_samples
        count = int(add(torch.tensor(float(here), dtype=torch.float64, device=self._shift.device)))
        if count == 0:
            return
        origin = (
            add(self._shift * here) / count
        )  # the same everywhere, and near the data: what is added is small
        mean = self.mu if here else origin
        mu = origin + add((mean - origin) * here) / count
        self._set(mu, add(self._scatter(mu)), count)

    def _summed(self) -> _Sums:
        """The sums with all features in them. Their matrix is as large as BLOCK rows, so it is not touched
        for fewer."""
        if self._waiting:
            self._sums.add(torch.cat(self._waiting))
            self._waiting = []
        return self._sums

    @property
    def num_features(self) -> int:
        return len(self._shift)

    @property
    def mu(self) -> Tensor:
        if self.num_samples == 0:
            raise UserError("statistics of no images have no mean; give at least 2 images")
        return self._shift + self._summed().total / self._summed().count

    @property
    def sigma(self) -> Tensor:
        if self.num_samples is not None and self.num_samples < 2:
            raise UserError(f"a covariance needs at least 2 images, and there are {self.num_samples}")
        if self._given is not None:
            return self._given
        sigma = self._scatter(self.mu) / (self._summed().count - 1)
        return (sigma + sigma.T) / 2

    def gaussian(self, name: str = "the statistics") -> Gaussian:
        return gaussian(self.mu, self.sigma, name)

    def _scatter(self, centre: Tensor) -> Tensor:
        """Sum of (x - centre)(x - centre)ᵀ over the samples, of which there may be none."""
        count = self._summed().count
        if count == 0:
            return self._sums.products
        mean = self._sums.total / count
        about_mean = self._sums.products - count * torch.outer(mean, mean)
        return about_mean + count * torch.outer(self._shift + mean - centre, self._shift + mean - centre)

    def _set(self, mu: Tensor, scatter: Tensor, num_samples: int | None) -> None:
        self.num_samples, self._shift, self._sums, self._given = num_samples, mu, _Sums(mu), None
        self._sums.products = scatter
        self._sums.count = num_samples or 2  # of an unknown number: divisor 1

    def save(self, path: Path | str, **more: Any) -> None:
        """An .npz of mu and sigma (float64) as pytorch-fid, EDM, ADM and clean-fid read it.

        more: arrays beside them, which those tools ignore; a mapping is kept as JSON.
        """
        more = {"protocol": self.protocol or None, **more}
        arrays: dict[str, Any] = {key: _array(value) for key, value in more.items() if value is not None}
        if self.num_samples is not None:
            arrays["num_samples"] = np.asarray(self.num_samples)
        checked(self.mu, self.sigma, f"the statistics for {path}")
        with new_file(_npz(path)) as temporary, temporary.open("wb") as stream:
            np.savez(stream, mu=self.mu.cpu().numpy(), sigma=self.sigma.cpu().numpy(), **arrays)

    @classmethod
    def load(cls, path: Path | str) -> Statistics:
        """From any .npz with mu and sigma. Raises UserError for what is not one."""
        return cls.of_arrays(read_npz(path), str(path))

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray], path: str) -> Statistics:
        """From the arrays of such a file; path: what an error calls it."""
        missing = [key for key in ("mu", "sigma") if key not in arrays]
        if missing:
            raise UserError(
                f"{path} has no {' and no '.join(missing)} (it has {', '.join(arrays) or 'nothing'}); "
                "write one with diffkd stats"
            )
        count = arrays.get("num_samples")
        if count is not None and not _is_count(count):
            raise UserError(
                f"{path}: num_samples is not a whole number of at least 2; write it with diffkd stats"
            )
        return cls.of(arrays["mu"], arrays["sigma"], None if count is None else int(count.item()), path)


def _is_count(array: np.ndarray) -> bool:
    known = array.size == 1 and array.dtype.kind in "iuf" and bool(np.isfinite(array))
    return known and bool(2 <= array == np.floor(array))


def _npz(path: Path | str) -> Path:
    path = Path(path)
    if path.suffix != ".npz":
        raise UserError(f"{path} is not a name for statistics; end it in .npz")
    return path


def _array(value: Any) -> np.ndarray:
    if isinstance(value, Mapping):
        return np.asarray(json.dumps(value))
    return value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
