"""Stratified splits: held-out images, and labels hidden for semi-supervised training; fixed by a seed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from diffkd.core.losses import UNLABELLED
from diffkd.core.noise import derived_seed
from diffkd.data.images import Images
from diffkd.errors import UserError


def stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """Indices of `count` images, ascending, each class in proportion: (count,).

    The n images of a class get the positions 0, 1/n, ..., (n - 1)/n in random order, and the `count` lowest
    positions of all are taken: one image of every class before a second of any.
    """
    rng = torch.Generator().manual_seed(derived_seed(seed))
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        of_class = (labels == label).nonzero()[:, 0]
        position[of_class] = torch.randperm(len(of_class), generator=rng).double() / len(of_class)
    return position.argsort(stable=True)[:count].sort().values


def hold_out(images: Images, count: int, seed: int) -> tuple[Images, Images]:
    """`count` images to measure accuracy on, and the rest to train on.

    Raises UserError for data without labels or with labels out of range, and where a class would have no
    image on one of the two sides.
    """
    if images.labels is None:
        raise UserError(
            f"{images.name} has no labels, and a classifier is trained and measured with them; give class "
            "subfolders or a label column, and leave data.labelled true"
        )
    low, high, classes = int(images.labels.min()), int(images.labels.max()), len(images.classes)
    if low < 0 or high >= classes:
        raise UserError(
            f"label {low if low < 0 else high} of {images.name} is out of range; with {classes} classes, "
            f"labels are 0 to {classes - 1}"
        )
    if not classes <= count <= len(images) - classes:
        raise UserError(
            f"held_out {count} of {len(images)} images in {classes} classes does not leave one of "
            f"each on both sides; use {classes} to {len(images) - classes}"
        )
    chosen = stratified(images.labels, count, seed)
    others = torch.ones(len(images), dtype=torch.bool)
    others[chosen] = False
    rest = images.take(others.nonzero()[:, 0])
    for label, left in enumerate(rest.class_counts):
        if left == 0:
            raise UserError(
                f"held_out {count} leaves no image of class {images.classes[label]} to train on "
                f"(it has {images.class_counts[label]}); use fewer, or leave that class out"
            )
    return images.take(chosen), rest


def few_labels(images: Images, count: int | None, seed: int) -> tuple[Images, Images]:
    """The images that keep their label, and all images with the labels of the others hidden (UNLABELLED).

    count: how many keep it; None for all. Raises UserError for fewer than classes or more than images.
    """
    assert images.labels is not None
    if count is None:
        return images, images
    if not len(images.classes) <= count <= len(images):
        raise UserError(
            f"labelled {count} is out of range; there are {len(images)} images in {len(images.classes)} "
            f"classes to train on: use {len(images.classes)} to {len(images)}"
        )
    chosen = stratified(images.labels, count, seed)
    hidden = torch.full_like(images.labels, UNLABELLED)
    hidden[chosen] = images.labels[chosen]
    return images.take(chosen), replace(images, labels=hidden)
