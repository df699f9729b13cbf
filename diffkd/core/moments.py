"""The distance of the distributions that two groups of particles come from, by their moments in a kernel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def discrepancy(y: Tensor, target: Tensor, scale: Tensor, together: Tensor) -> Tensor:
    """Each particle's share in the squared MMD of its group, with the kernel exp(-scale |a - b| / D): (B,).

    y, target: (B, ...) of D values each. scale: (B,), the same within a group. together: whether two are of
    one group: (B, B), or (B / M, M, M) for the blocks of M that follow each other, where no group is in two.
    The mean over a group of M is sum_jk [k(y_j, y_k) + k(x_j, x_k) - 2 k(y_j, x_k)] / M², x the target, with
    its terms of j = k (Zhou, Ermon & Song 2025, equation 67).
    """
    y, target = (x.reshape(*together.shape[:-1], -1) for x in (y, target))
    rate = -scale.reshape(together.shape[:-1])[..., None] / y.shape[-1]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (rate * torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")).exp()

    terms = kernel(y, y) + kernel(target, target) - kernel(y, target) - kernel(target, y)
    return (torch.where(together, terms, 0.0).sum(-1) / together.sum(-1)).flatten()


def of_one_group(group: Tensor, size: int, cond: Mapping[str, Tensor]) -> Tensor:
    """Whether two examples are of one group and have the same conditioning, without which their distributions
    are not one: by blocks of a group, where all are whole, and not for all pairs of a batch."""
    blocks = group.reshape(-1, size if len(group) % size == 0 else len(group))
    alike = blocks[:, :, None] == blocks[:, None]
    for value in cond.values():
        values = value.reshape(*blocks.shape, -1).float()
        alike &= torch.cdist(values, values, p=0) == 0
    return alike
