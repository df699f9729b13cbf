"""Images of several shapes, in buckets of like ones: a batch is of one bucket (Podell et al. 2023, 2.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffkd.data.images import Images
from diffkd.data.on_demand import OnDemand
from diffkd.data.packed import PackedStrings
from diffkd.data.shards import Shards, keyed

MOST_ASPECT = 2.0  # of a shape's sides

Shape = tuple[int, int]  # height and width


def bucket_shapes(size: int, step: int) -> list[Shape]:
    """Shapes of at most size x size pixels whose sides are multiples of `step`, each the highest of its
    width, the widest last; the square one is among them where `step` divides `size`."""
    found = []
    for width in range(step, math.ceil(MOST_ASPECT * size) + 1, step):
        height = size * size // width // step * step
        if height and max(height, width) <= MOST_ASPECT * min(height, width):
            found.append((height, width))
    return found


def nearest(sizes: Tensor, among: Sequence[Shape]) -> Tensor:
    """The place in `among` of the shape whose aspect is nearest, in the logarithm. sizes: (N, 2), height and
    width of each image. Returns (N,) int64."""
    aspects = torch.tensor([height / width for height, width in among], dtype=torch.float64).log()
    own = (sizes[:, 0].double() / sizes[:, 1]).log()
    return (own[:, None] - aspects).abs().argmin(1)


def cropped(sizes: Tensor, shape: Shape) -> Tensor:
    """What SDXL is told of images: height and width that they had, top and left of the crop where they were
    resized to cover the shape and cut in the centre. (N, 2) -> (N, 4) float32."""
    wanted = torch.tensor(shape, dtype=torch.float64)
    scale = (wanted / sizes).amax(1, keepdim=True)
    corner = ((sizes * scale - wanted) / 2).round()
    return torch.cat([sizes.double(), corner], 1).float()


@dataclass(frozen=True)
class Sizes:
    """Height and width of each image of a dataset, (N, 2) int64, in its order. fingerprint: of its files.

    Kept beside the latents, they are read once and not at every start.
    """

    values: Tensor
    fingerprint: str

    @classmethod
    def of(cls, images: OnDemand, fingerprint: str, kept: Path | None) -> Sizes:
        """By the heads of all files, or as they were kept in a folder."""

        def check(found: dict[str, Tensor]) -> None:
            if found["sizes"].shape != (len(images), 2) or found["sizes"].dtype != torch.int64:
                raise ValueError("it holds other tensors")

        found = None if kept is None else _place(kept, fingerprint).read(0, check)
        return cls(images.sizes() if found is None else found["sizes"], fingerprint)

    def keep(self, folder: Path) -> None:
        """Writes them, where they are not there; by one process."""
        place = _place(folder, self.fingerprint)
        if place.missing():
            place.begin()
            place.write(0, {"sizes": self.values})


def _place(folder: Path, fingerprint: str) -> Shards:
    return keyed(folder, "sizes", {"images": fingerprint}, 1, 1)


@dataclass(frozen=True)
class BucketedImages(Images):
    """parts: the images of each bucket, the most frequent shape first, whose shape and pixels stand for all.
    labels and captions are those of the parts, one after the other. sizes: what buckets were chosen by."""

    parts: tuple[Images, ...] = ()
    sizes: Sizes | None = None

    @staticmethod
    def of(parts: Sequence[Images], sizes: Sizes | None = None) -> BucketedImages:
        """Those of several shapes as one."""
        ordered = tuple(sorted(parts, key=len, reverse=True))
        first, labels = ordered[0], [part.labels for part in ordered if part.labels is not None]
        captions = PackedStrings(caption for part in ordered for caption in part.captions)
        return BucketedImages(
            first.name, first.pixels, torch.cat(labels) if labels else None, first.classes, first.flip,
            captions, parts=ordered, sizes=sizes,
        )  # fmt: skip

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def digest(self) -> str:
        return " ".join(part.digest() for part in self.parts)
