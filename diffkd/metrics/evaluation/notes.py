"""What a reader of a number must know beside its protocol, a line each: kept in the record as `notes`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from diffkd.metrics.evaluation.collector import Pixels
from diffkd.metrics.evaluation.reference import Reference
from diffkd.metrics.features.inception_weights import NAMES
from diffkd.metrics.features.trained import PREFIX

Size = tuple[int, int]  # width and height of images
UNKNOWN = "{} does not say by which features, weights and resize it was made"
GAUSSIAN = ("fid", "fd_inf")  # metrics of the main features' covariance
PUBLISHED = tuple(name.rpartition(".")[0] for name in NAMES)  # names of Inception's weights


def notes(
    reference: Reference,
    description: Mapping[str, Any],
    metrics: Mapping[str, Any],
    count: int,
    size: Size | None,
    pixels: Pixels | None,
) -> Iterator[str]:
    """description: of the main feature network. metrics: the numbers. count, size, pixels: of the images that
    are measured; size and pixels where they are known."""
    if description["name"].startswith(PREFIX):
        yield (
            f"features of a network that was trained on images of your own, {description['name']}: such "
            "numbers compare only among those by the same file"
        )
    if description["name"] == "inception" and description.get("weights", PUBLISHED[0]) not in PUBLISHED:
        yield (
            f"Inception with weights of your own, {description['weights']} (sha256 "
            f"{description['sha256'][:8]}): such numbers compare only among themselves"
        )
    if reference.statistics is not None and not reference.protocol.get("features"):
        how = ", ".join(str(description[key]) for key in ("name", "resize") if description.get(key))
        yield (
            f"{UNKNOWN.format(reference.name)}: the numbers mean something only if they were those used here "
            f"({how})"
        )
    if size is not None and reference.size is not None and size != reference.size:
        (w, h), (real_w, real_h) = size, reference.size
        yield (
            f"the images are {w}x{h} and the reference's {real_w}x{real_h}: a part of the distance may be "
            "that of the sizes; compare images of one size"
        )
    wide = description["num_features"]
    few = {"images": count, "reference": reference.count}
    short = [f"{n:,} of the {name}" for name, n in few.items() if n is not None and n <= wide]
    if short and any(metric in metrics for metric in GAUSSIAN):
        yield (
            f"no more images than features ({' and '.join(short)}, {wide:,} features): the covariance is "
            "singular, and FID is mostly a matter of how many images there are"
        )
    if pixels is None:
        return
    if pixels.copies:
        yield f"{pixels.copies:,} of the {count:,} images are copies of others among them"
    if reference.sha256 == pixels.sha256:
        yield "the images are those of the reference itself"
    elif reference.pixels is not None and (shared := pixels.in_common(reference.pixels)):
        yield f"{shared:,} of the {count:,} images are also in the reference"
