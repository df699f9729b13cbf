"""`diffkd stats`: the statistics of a set of images, computed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from diffkd.errors import Unfinished, UserError, printable
from diffkd.io import progress
from diffkd.io.environment import commit, versions
from diffkd.io.places import check_writable, expanded, free_bytes
from diffkd.io.processes import Processes
from diffkd.io.text import format_bytes
from diffkd.metrics import features
from diffkd.metrics.evaluation import feature_cache, image_sets, presets
from diffkd.metrics.evaluation.targets import is_model


def stats(
    text: str,
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
    if out.suffix != ".npz":
        raise UserError(f"--out {out} is not a name for statistics; end it in .npz")
    check_writable(out, "--out")
    if isinstance(cache, str):
        check_writable(expanded(cache), "--cache", folder=True)
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already; use another --out, or --overwrite")
    if is_model(text) and Path(text).is_dir():
        raise UserError(f"{text} is a model; give images (diffkd sample draws them)")
    if preset is not None:
        how = presets.of_tool(preset, features=features_name, resize=feature_resize, dtype=dtype)
        features_name, feature_resize, dtype = how["features"], how["resize"], how["dtype"]
    spec = image_sets.parse(text, resize=resize, split=split or "train", as_stored=presets.as_stored(preset))
    source = image_sets.images_of(spec)
    name = features_name or (source.name if source.name in image_sets.SETS else "inception")
    processes = Processes(device)
    network = features.load(name, weights=weights, resize=feature_resize, dtype=dtype).to(processes.device)
    described = features.describe(name, network)
    _check_room(out, described["num_features"], len(source) if store else 0)
    title = printable(f"{name} features of {source.name}")
    with progress.bar(console, title, len(source), shown=processes.main) as advance:
        found, pixels, kept = feature_cache.features_of(
            source, {name: network}, {name: described}, {name} if store else set(), processes,
            batch_size=batch_size, cached=cache, on_images=progress.counter(advance, processes.world),
        )  # fmt: skip
    protocol = {
        "features": described, "samples": len(source), "name": source.name, "size": list(source.size),
        "spec": spec.model_dump(mode="json"), "sha256": pixels.sha256,
        "versions": versions(), "commit": commit(),
    }  # fmt: skip
    if processes.main:
        for note in source.notes:
            progress.say(console, note)
        if pixels.copies:
            progress.say(console, f"{pixels.copies:,} of the images are copies of others among them")
        found[name].statistics.save(
            out, protocol=protocol, labels=source.labels, features=found[name].stored if store else None
        )
        from_cache = ", kept from an earlier command" if kept else ""
        progress.say(console, f"{len(source):,} images, {name} features{from_cache}: {out}")
    return out


def _check_room(out: Path, wide: int, stored: int) -> None:
    """Raises Unfinished where the disk is too full for statistics, and `stored` features, of that width."""
    size, free = 8 * wide * (wide + 1) + 4 * wide * stored, free_bytes(out)
    if size > free:
        raise Unfinished(
            f"--out {out} takes {format_bytes(size)}, and its disk has {format_bytes(free)} left; make room, "
            "or use another place"
        )
