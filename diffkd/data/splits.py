"""Images held out and labels hidden: of every class its share, the same for the same seed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from diffkd.core.losses import UNLABELLED
from diffkd.core.noise import derived_seed
from diffkd.data.images import Images
from diffkd.errors import UserError


def stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """Indices of `count` images, in order, of each class its share: (count,).

    The images of a class stand in random order at 0, 1/n, ..., (n - 1)/n, and the first of all are taken: one
    of each class before a second of any.
    """
    rng = torch.Generator().manual_seed(derived_seed(seed))
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        of_class = (labels == label).nonzero()[:, 0]
        place[of_class] = torch.randperm(len(of_class), generator=rng).double() / len(of_class)
    return place.argsort(stable=True)[:count].sort().values


def hold_out(images: Images, count: int, seed: int) -> tuple[Images, Images]:
    """The images that accuracy is measured with, and the rest.

    Raises UserError for data without labels or with labels out of range, and where a class would have no
    image on either side.
    """
    if images.labels is None:
        raise UserError(
            f"{images.name} has no labels, which a classifier is trained and measured with; give class "
            "subfolders or a label column, and leave data.labelled true"
        )
    low, high, classes = int(images.labels.min()), int(images.labels.max()), len(images.classes)
    if low < 0 or high >= classes:
        raise UserError(
            f"label {low if low < 0 else high} of {images.name} is out of range; with {classes} classes they "
            f"are 0 to {classes - 1}"
        )
    if not classes <= count <= len(images) - classes:
        raise UserError(
            f"held_out {count} of {len(images)} images in {classes} classes does not leave one of each on "
            f"both sides; use {classes} to {len(images) - classes}"
        )
    chosen = stratified(images.labels, count, seed)
    others = torch.ones(len(images), dtype=torch.bool)
    others[chosen] = False
    rest = _part(images, others.nonzero()[:, 0])
    for label, left in enumerate(rest.class_counts):
        if left == 0:
            raise UserError(
                f"held_out {count} leaves class {images.classes[label]} no image to train with "
                f"(it has {images.class_counts[label]}); use fewer, or leave that class out"
            )
    return _part(images, chosen), rest


def few_labels(images: Images, count: int | None, seed: int) -> tuple[Images, Images]:
    """The images that have a label, and all of them with the labels of the others hidden (UNLABELLED).

    count: how many; None for all. Raises UserError for fewer than classes, and for more than there are.
    """
    assert images.labels is not None
    if count is None:
        return images, images
    if not len(images.classes) <= count <= len(images):
        raise UserError(
            f"labelled {count} is out of range; {len(images)} images in {len(images.classes)} classes are "
            f"there to train with: use {len(images.classes)} to {len(images)}"
        )
    chosen = stratified(images.labels, count, seed)
    hidden = torch.full_like(images.labels, UNLABELLED)
    hidden[chosen] = images.labels[chosen]
    return _part(images, chosen), replace(images, labels=hidden)


def _part(images: Images, indices: Tensor) -> Images:
    assert images.labels is not None
    return replace(images, pixels=images.pixels[indices.numpy()], labels=images.labels[indices])
