"""`diffkd stats` and `diffkd.compute_statistics`: the statistics of a set of images, computed once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console

from diffkd.errors import Unfinished, UserError, printable
from diffkd.io import progress
from diffkd.io.config import Strict
from diffkd.io.environment import commit, versions
from diffkd.io.naming import called
from diffkd.io.places import check_writable, expanded, free_bytes
from diffkd.io.processes import Processes, on_device
from diffkd.io.text import format_bytes
from diffkd.metrics import features
from diffkd.metrics.evaluation import feature_cache, image_sets, presets
from diffkd.metrics.evaluation.image_sources import ArraySource, Source
from diffkd.metrics.evaluation.in_memory import Given, InMemory, source_of
from diffkd.metrics.evaluation.targets import is_model
from diffkd.metrics.statistics import Statistics


def stats(
    images: str,
    out: Path,
    console: Console,
    *,
    features_name: str | None = None,
    weights: str | None = None,
    feature_resize: Any = None,
    dtype: str | None = None,
    preset: str | None = None,
    resize: int | None = None,
    split: str | None = None,
    store: bool = False,
    batch_size: int = 64,
    device: str | None = None,
    overwrite: bool = False,
    cache: bool | str = True,
) -> Path:
    """Writes the statistics of a set of images, with their protocol, to an .npz. Raises UserError."""
    _computed(
        images, out, console, features_name=features_name, weights=weights, feature_resize=feature_resize,
        dtype=dtype, preset=preset, resize=resize, split=split, store=store, batch_size=batch_size,
        device=device, overwrite=overwrite, cache=cache,
    )  # fmt: skip
    return out


def compute_statistics(
    images: str | Path | Given,
    *,
    features: str | None = None,
    out: str | Path | None = None,
    weights: str | None = None,
    feature_resize: str | None = None,
    dtype: str | None = None,
    preset: str | None = None,
    resize: int | None = None,
    split: str | None = None,
    store_features: bool = False,
    batch_size: int = 64,
    device: str | None = None,
    overwrite: bool = False,
    cache: bool | str = True,
    quiet: bool = True,
) -> Statistics:
    """Mean and covariance of the features of images, as `diffkd stats` computes them: a reference for
    `diffkd.evaluate`, again and again.

    images: a folder, an .npz, "digits", a data set, an array, a tensor, or anything that yields images, as
    for `diffkd.evaluate`. features: default digits for digits, else inception. out: an .npz to write as well,
    which other FID tools read. store_features: keep every feature in it, for kid, prdc and cmmd. The rest are
    the command's options. Raises UserError where the command would end with exit status 2.

    >>> import diffkd
    >>> statistics = diffkd.compute_statistics("digits")
    >>> statistics.num_samples, statistics.protocol["features"]["name"]
    (1797, 'digits')
    >>> diffkd.evaluate("digits", statistics)["fid"] < 1e-9
    True
    """
    if store_features and out is None:
        raise UserError("store_features keeps features in a file; name it as out, or leave it out")
    given = os.fspath(images) if isinstance(images, str | os.PathLike) else source_of(images)
    with on_device(device):
        return _computed(
            given, None if out is None else expanded(out), Console(quiet=quiet), features_name=features,
            weights=weights, feature_resize=feature_resize, dtype=dtype, preset=preset, resize=resize,
            split=split, store=store_features, batch_size=batch_size, device=device, overwrite=overwrite,
            cache=cache,
        )  # fmt: skip


def _computed(
    images: str | ArraySource,
    out: Path | None,
    console: Console,
    *,
    features_name: str | None,
    weights: str | None,
    feature_resize: Any,
    dtype: str | None,
    preset: str | None,
    resize: int | None,
    split: str | None,
    store: bool,
    batch_size: int,
    device: str | None,
    overwrite: bool,
    cache: bool | str,
) -> Statistics:
    """The statistics, written to `out` unless that is None."""
    if out is not None:
        _check_out(out, overwrite)
    if isinstance(cache, str):
        check_writable(expanded(cache), called("cache"), folder=True)
    if preset is not None:
        how = presets.of_tool(preset, features=features_name, resize=feature_resize, dtype=dtype)
        features_name, feature_resize, dtype = how["features"], how["resize"], how["dtype"]
    source, spec = _opened(images, resize=resize, split=split, as_stored=presets.as_stored(preset))
    name = features_name or (source.name if source.name in image_sets.SETS else "inception")
    processes = Processes(device)
    network = features.load(name, weights=weights, resize=feature_resize, dtype=dtype).to(processes.device)
    described = features.describe(name, network)
    if out is not None:
        _check_room(out, described["num_features"], len(source) if store else 0)
    title = printable(f"{name} features of {source.name}")
    with progress.bar(console, title, len(source), shown=processes.main) as advance:
        found, pixels, kept = feature_cache.features_of(
            source, {name: network}, {name: described}, {name} if store else set(), processes,
            batch_size=batch_size, cached=cache, on_images=progress.counter(advance, processes.world),
        )  # fmt: skip
    statistics = found[name].statistics
    statistics.protocol = {
        "features": described, "samples": len(source), "name": source.name,
        "size": None if source.size is None else [*source.size],
        "spec": spec.model_dump(mode="json"), "sha256": pixels.sha256,
        "versions": versions(), "commit": commit(),
    }  # fmt: skip
    if processes.main:
        for note in source.notes:
            progress.say(console, note)
        if pixels.copies:
            progress.say(console, f"{pixels.copies:,} of the images are copies of others among them")
        if out is not None:
            statistics.save(out, labels=source.labels, features=found[name].stored if store else None)
        from_cache = ", kept from an earlier command" if kept else ""
        written = "" if out is None else f": {out}"
        progress.say(console, f"{len(source):,} images, {name} features{from_cache}{written}")
    return statistics


def _opened(
    images: str | ArraySource, *, resize: int | None, split: str | None, as_stored: bool
) -> tuple[Source, Strict]:
    """The images, and what a protocol says of where they are. Raises UserError for a model."""
    if isinstance(images, ArraySource):
        image_sets.check_used([], resize=resize, split=split)
        return images, InMemory()
    if is_model(images) and Path(images).is_dir():
        raise UserError(f"{images} is a model; give images (diffkd sample draws them)")
    image_sets.check_used([images], resize=resize, split=split)
    spec = image_sets.parse(images, resize=resize, split=split or "train", as_stored=as_stored)
    return image_sets.images_of(spec), spec


def _check_out(out: Path, overwrite: bool) -> None:
    name = called("out")
    if out.suffix != ".npz":
        raise UserError(f"{name} {out} is not a name for statistics; end it in .npz")
    check_writable(out, name)
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already; use another {name}, or {called('overwrite')}")


def _check_room(out: Path, wide: int, stored: int) -> None:
    """Raises Unfinished where the disk is too full for statistics, and `stored` features, of that width."""
    size, free = 8 * wide * (wide + 1) + 4 * wide * stored, free_bytes(out)
    if size > free:
        raise Unfinished(
            f"{called('out')} {out} takes {format_bytes(size)}, and its disk has {format_bytes(free)} left; "
            "make room, or use another place"
        )
