"""FID within each class, and their mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from diffkd.errors import UserError
from diffkd.io.text import quoted
from diffkd.metrics.base import Inputs, Labelled, Metric, Value
from diffkd.metrics.frechet import distance
from diffkd.metrics.sampling_error import gaussian_of

LEAST = 2  # images of a class that have a covariance


class Class(NamedTuple):
    """images, reference: the indices of a class in either set, (n,)."""

    name: str
    images: Tensor
    reference: Tensor


def classes_of(images: Labelled, reference: Labelled) -> Iterator[Class]:
    """The classes of two sets in order, by their names, or by their numbers where a set has no names.

    Raises UserError for a class of which either set has fewer than LEAST images.
    """
    named = bool(images.classes and reference.classes)
    sides = (images, reference)
    ours, theirs = ({_name(side, k, named): k for k in side.labels.unique().tolist()} for side in sides)
    for name in sorted(ours.keys() | theirs.keys(), key=lambda name: (not name.isdigit(), len(name), name)):
        found = [
            (side.labels == known[name]).nonzero()[:, 0] if name in known else side.labels[:0]
            for side, known in zip(sides, (ours, theirs), strict=True)
        ]
        if min(map(len, found)) < LEAST:
            raise UserError(
                f"class {quoted(name)} has {len(found[0])} of the images and {len(found[1])} of the "
                f"reference, and FID within a class needs at least {LEAST} of each; give more, or leave "
                "class_fid out"
            )
        yield Class(name, *found)


def _name(side: Labelled, number: int, named: bool) -> str:
    return side.classes[number] if named else str(number)


class ClassFid(Metric):
    """The Fréchet distance within each class, and its mean over classes: intra FID (Miyato & Koyama 2018)."""

    name: ClassVar[str] = "class_fid"
    values: ClassVar[tuple[Value, ...]] = (Value("class_fid", "mean FID of classes", ".3f"),)
    stores_reference: ClassVar[bool] = True
    stores_images: ClassVar[bool] = True
    with_labels: ClassVar[bool] = True

    def check_labels(self, images: Labelled, reference: Labelled) -> None:
        for _ in classes_of(images, reference):
            pass

    def compute(self, inputs: Inputs) -> dict[str, Any]:
        """Beside the mean "class_fids", the distance of each class by its name."""
        assert inputs.labels is not None and inputs.reference_labels is not None
        found = {}
        for name, ours, theirs in classes_of(inputs.labels, inputs.reference_labels):
            real = inputs.reference.features
            one, two = inputs.images.features[ours.to(real.device)], real[theirs.to(real.device)]
            found[name] = distance(gaussian_of(one), gaussian_of(two))
        return {"class_fid": sum(found.values()) / len(found), "class_fids": found}
