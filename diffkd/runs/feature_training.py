"""`diffkd features`: a feature network trained on images of the user's own, and what its file says of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from diffkd.errors import UserError, printable
from diffkd.io import progress
from diffkd.io.naming import called
from diffkd.io.places import check_writable, expanded
from diffkd.io.processes import Processes
from diffkd.io.text import counted, log
from diffkd.metrics.evaluation import image_sets
from diffkd.metrics.evaluation.image_sources import Source, batches, thinned
from diffkd.metrics.features import learning, trained
from diffkd.metrics.features.trained import GROUPS, SIZES, SUFFIX, About, TrainedFeatures

LEAST, MOST = 50, 100_000  # images to learn from
READ = 256  # images at a time
DEFAULT_SIDE = 64  # at most, of the network's input
COLLAPSED = 0.05  # of the features: an effective rank below is hardly any direction
ALONE = "FID and KID by these features compare only with those by the same file, named {} in records"


def train(
    text: str,
    out: Path,
    console: Console,
    *,
    resize: int | None = None,
    split: str | None = None,
    size: int | None = None,
    num_features: int = 64,
    width: int = 32,
    updates: int = 1500,
    views: bool = False,
    seed: int = 0,
    device: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a network that learned to tell the classes of images, or, without classes, views of one image
    from those of others; with `views` so whatever classes there are. Raises UserError for images that teach
    nothing."""
    if out.suffix != SUFFIX:
        raise UserError(f"{called('out')} {out} is not a name for a feature network; end it in {SUFFIX}")
    check_writable(out, called("out"))
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already; use another {called('out')}, or {called('overwrite')}")
    if size not in (None, *SIZES):
        raise UserError(
            f"{called('size')} {size} is not one of {', '.join(map(str, SIZES))}; use the nearest"
        )
    if width % GROUPS:
        raise UserError(
            f"{called('width')} {width} is not a multiple of {GROUPS}; use {-(-width // GROUPS) * GROUPS}"
        )
    image_sets.check_used([text], resize=resize, split=split)
    source = image_sets.images_of(image_sets.parse(text, resize=resize, split=split or "train"))
    if len(source) < LEAST:
        raise UserError(f"{source.name} holds {len(source)} images; a feature network needs at least {LEAST}")
    processes = Processes(device)
    if processes.world > 1:
        raise UserError("diffkd features trains in one process; start it without the launcher")
    source = thinned(source, min(len(source), MOST))
    assert source.size is not None  # it is not as other tools decode it
    labels, classes = (None, list[str]()) if views else _classes(source)
    images = _images(source, size or side_for(*source.size), console)
    what = "views of images" if labels is None else f"{len(classes)} classes"
    with progress.bar(console, f"learning {what}", updates, unit="updates") as advance:
        found = learning.learn(
            images, labels, num_classes=len(classes), num_features=num_features, width=width, updates=updates,
            seed=seed, device=processes.device, on_update=progress.counter(advance),
        )  # fmt: skip
    _check(found, num_features)
    network, *measured = found
    names = found._fields[1:]
    about = About.model_validate({
        "channels": images.shape[1], "size": images.shape[2], "width": width, "num_features": num_features,
        "classes": classes, "updates": updates, "seed": seed, **dict(zip(names, measured, strict=True)),
    })  # fmt: skip
    trained.save(out, network, about)
    show(out, console)
    return out


def show(path: Path, console: Console) -> None:
    """What a file says of its network, in lines."""
    network = TrainedFeatures(expanded(path))
    for line in _told(network.about):
        progress.say(console, line)
    progress.say(console, ALONE.format(network.describe()["name"]))


def _told(about: About) -> Iterator[str]:
    kind = "grey" if about.channels == 1 else "RGB"
    yield (
        f"{about.num_features} features of {kind} images at {about.size}x{about.size}, learned from "
        f"{about.images:,} in {about.updates:,} updates (seed {about.seed})"
    )
    if about.accuracy is not None:
        yield (
            f"classes: {about.accuracy:.1%} of {about.held_out:,} held-out images told right, among "
            f"{len(about.classes)} (the largest alone: {about.largest_class or 0:.1%})"
        )
    if about.same_image is not None:
        yield f"views: {about.same_image:.1%} of held-out images are told by another view of them"
    yield f"effective rank of the features: {about.effective_rank:.1f} of {about.num_features}"


def _classes(source: Source) -> tuple[Tensor | None, list[str]]:
    """(labels from 0 without gaps, names) of what can be told apart; (None, []) for images of fewer than two
    classes."""
    if source.labels is None:
        return None, []
    values, labels = source.labels.unique(return_inverse=True)
    if len(values) < 2:
        return None, []
    names = source.classes or [str(i) for i in range(int(values.max()) + 1)]
    return labels, [names[i] for i in values.tolist()]


def side_for(width: int, height: int) -> int:
    """The network's size for images of that size: the least of SIZES that holds the shorter side, at most
    DEFAULT_SIDE."""
    return next(side for side in SIZES if side >= min(width, height, DEFAULT_SIDE))


def _images(source: Source, size: int, console: Console) -> Tensor:
    """(N, C, size, size) uint8, as the network is given them; C is 1 where all of them are grey."""
    parts, grey = [], True
    with progress.bar(console, printable(source.name), len(source)) as advance:
        on_images = progress.counter(advance)
        for _, images in batches(source, len(source), READ):
            grey = grey and bool((images == images[..., :1]).all())
            x = trained.brought_to(images.permute(0, 3, 1, 2), images.shape[-1], size)
            parts.append(((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
            on_images(len(images))
    whole = torch.cat(parts)
    return whole[:, :1].contiguous() if grey else whole


def _check(found: learning.Learned, num_features: int) -> None:
    """Raises UserError for features that collapsed; says of classes that were not learned, and where all else
    was forgotten for them."""
    least = 1 if found.same_image is None else COLLAPSED * num_features
    if found.effective_rank < least:
        raise UserError(
            f"the features collapsed: their effective rank is {found.effective_rank:.1f} of {num_features}; "
            "give more or more different images, or train longer (--updates)"
        )
    if found.accuracy is not None and found.largest_class is not None:
        chance = found.largest_class
        error = (chance * (1 - chance) / found.held_out) ** 0.5
        if found.accuracy < chance + 2 * error:
            log.warning(
                "the classes were hardly learned (%.1f%% of held-out images are told right, %.1f%% are of "
                "the largest class): distances by these features say little; train longer (--updates), or "
                "give more images",
                100 * found.accuracy, 100 * chance,
            )  # fmt: skip
        if found.effective_rank < max(2, COLLAPSED * num_features):
            log.warning(
                "the features vary in hardly more than %s (effective rank %.1f of %d): they tell the classes "
                "and nothing within one; --views learns to see that",
                counted(round(found.effective_rank), "direction"), found.effective_rank, num_features,
            )  # fmt: skip
