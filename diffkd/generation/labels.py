"""Which class label each image gets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.io.text import is_number
from diffkd.models import loading

GOLDEN_RATIO = (5**0.5 - 1) / 2
MAX_CLASSES = 1_000_000


def parse_classes(text: str) -> list[int] | str:
    """Labels from text such as 0-9 or 3,5,7; the words "balanced" (every class in turn) and "data" (as often
    as in the model's data) as they are."""
    if text in ("balanced", "data"):
        return text
    labels: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (is_number(first) and (is_number(last) or not dash)) or int(last or first) < int(first):
            raise UserError(
                f"--classes {text!r} is not understood; use balanced, data, or labels such as 0-9 or 3,5,7"
            )
        if int(last or first) > MAX_CLASSES:
            raise UserError(f"--classes {text!r} is out of range; no model has that many classes")
        labels += range(int(first), int(last or first) + 1)
    return labels


def labels_for(denoiser: Denoiser, n: int, labels: Sequence[int] | Tensor | None) -> Tensor | None:
    """Labels of images 0 to n - 1, (n,): those given, repeated in turn, or every class in turn; None for an
    unconditional model.

    Raises UserError for labels that the model does not take.
    """
    if denoiser.num_classes is None:
        if labels is not None:
            what = "is unconditional" if denoiser.conditioner is None else "draws from prompts"
            raise UserError(f"class labels were given, and this model {what}; leave them out")
        return None
    given = list(range(denoiser.num_classes) if labels is None else map(int, labels))
    invalid = [label for label in given if not 0 <= label < denoiser.num_classes]
    if invalid or not given:
        value = invalid[0] if invalid else "(none)"
        raise UserError(
            f"class label {value} is out of range; this model has labels 0 to {denoiser.num_classes - 1}"
        )
    return torch.tensor(given)[torch.arange(n) % len(given)]


def requested_labels(
    classes: list[int] | str, denoiser: Denoiser, model: str, n: int
) -> Sequence[int] | Tensor | None:
    """What `parse_classes` gave as the `labels` of `labels_for`. model: the path or hub id of the denoiser.

    Raises UserError for "data" where the model's card does not say how often each class occurs.
    """
    if isinstance(classes, list):
        return classes
    if classes == "balanced" or denoiser.num_classes is None:
        return None
    counts = loading.card(loading.folder_of(model)).get("class_counts")
    if not (
        isinstance(counts, list)
        and len(counts) == denoiser.num_classes
        and all(type(count) is int and count >= 0 for count in counts)
        and any(counts)
    ):
        raise UserError(
            f"{model} does not say how often each class is in its data; use --classes balanced, or a list"
        )
    return proportional(counts, n)


def proportional(counts: Sequence[int], n: int) -> Tensor:
    """n labels, each class in proportion to its count; label i does not depend on n.

    Uses the multiples of the golden ratio, which fill [0, 1) evenly.
    """
    bounds = torch.tensor(counts, dtype=torch.float64).cumsum(0)
    position = (torch.arange(n, dtype=torch.float64) * GOLDEN_RATIO + 0.5) % 1
    return torch.searchsorted(bounds, position * bounds[-1], right=True)
