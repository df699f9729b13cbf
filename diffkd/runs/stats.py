"""`diffkd stats`: the statistics of a set of images, computed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from diffkd.errors import UserError, printable
from diffkd.io import progress
from diffkd.io.environment import commit, versions
from diffkd.io.files import check_writable
from diffkd.io.processes import Processes
from diffkd.metrics import features
from diffkd.metrics.evaluation import image_sets, image_sources
from diffkd.metrics.evaluation.collector import Collector, Pixels
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
    resize: int | None = None,
    split: str | None = None,
    store: bool = False,
    batch_size: int = 64,
    device: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the statistics of a set of images, with their protocol, to an .npz. Raises UserError."""
    if out.suffix != ".npz":
        raise UserError(f"--out {out} is not a name for statistics; end it in .npz")
    check_writable(out, "--out")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already; use another --out, or --overwrite")
    if is_model(text) and Path(text).is_dir():
        raise UserError(f"{text} is a model; give images (diffkd sample draws them)")
    spec = image_sets.parse(text, resize=resize, split=split or "train")
    source = image_sets.images_of(spec)
    name = features_name or ("digits" if source.name == "digits" else "inception")
    processes = Processes(device)
    network = features.load(name, weights=weights, resize=feature_resize, dtype=dtype)
    collector = Collector(network.to(processes.device), len(source), processes.device, store=store)
    pixels = Pixels(len(source))
    title = printable(f"{name} features of {source.name}")
    with progress.bar(console, title, len(source), shown=processes.main) as advance:
        count = progress.counter(advance, processes.world)
        for first, images in image_sources.batches(
            source, len(source), batch_size, processes.rank, processes.world
        ):
            pixels.update(first, images)
            collector.update(first, images.to(processes.device))
            count(len(images))
    collector.merge_across(processes.add)
    protocol = {
        "features": features.describe(name, network), "samples": len(source), "name": source.name,
        "spec": spec.model_dump(mode="json"), "sha256": pixels.sha256(processes.add),
        "versions": versions(), "commit": commit(),
    }  # fmt: skip
    if processes.main:
        collector.statistics.save(
            out, protocol=protocol, labels=source.labels, features=collector.features if store else None
        )
        progress.say(console, f"{len(source):,} images, {name} features: {out}")
    return out
