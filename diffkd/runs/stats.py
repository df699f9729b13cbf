"""`diffkd stats`: the statistics of a set of images, computed once."""

from __future__ import annotations

from pathlib import Path
from rich.console import Console
from typing import Any
from diffkd.errors import UserError
from diffkd.errors import printable
from diffkd.io.environment import commit
from diffkd.io.environment import versions
from diffkd.io.files import check_writable
from diffkd.io.progress import bar
from diffkd.metrics import features
from diffkd.metrics.evaluation import image_sets
from diffkd.metrics.evaluation.collector import Collector
from diffkd.metrics.evaluation.collector import Pixels
from diffkd.metrics.evaluation.targets import is_model
from diffkd.runs.evaluate import Work


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
    split: str = "train",
    store: bool = False,
    batch_size: int = 64,
    device: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the statistics of a set of images, with their protocol, to an .npz."""
    if out.suffix != ".npz":
        raise UserError(f"--out {out} is no name for statistics; end it in .npz")
    check_writable(out, "--out")
    if out.exists() and not overwrite:
        raise UserError(f"{out} is there already; use another --out, or --overwrite")
    if is_model(text) and Path(text).is_dir():
        raise UserError(f"{text} is a model; give images (diffkd sample draws them)")
    spec = image_sets.parse(text, resize=resize, split=split)
    source = image_sets.images_of(spec)
    name = features_name or ("digits" if source.name == "digits" else "inception")
    work = Work(console, device)
    network = features.load(name, weights=weights, resize=feature_resize, dtype=dtype)
    collector = Collector(network.to(work.processes.device), len(source), work.processes.device, store=store)
    pixels = Pixels(len(source))
    title = printable(f"{name} features of {source.name}")
    with bar(console, title, len(source), shown=work.processes.main) as advance:
        counted = work.counted(advance)
        place = work.processes.rank, work.processes.world
        for first, images in image_sets.batches(source, len(source), batch_size, *place):
            pixels.update(first, images)
            collector.update(first, images.to(work.processes.device))
            counted(len(images))
    collector.merge_across(work.processes.add)
    protocol = {
        "features": features.describe(name, network), "samples": len(source), "name": source.name,
        "spec": spec.model_dump(mode="json"), "sha256": pixels.sha256(work.processes.add),
        "versions": versions(), "commit": commit(),
    }  # fmt: skip
    if work.processes.main:
        collector.statistics.save(
            out, protocol=protocol, labels=source.labels, features=collector.features if store else None
        )
    work.say(f"{len(source):,} images, {name} features: {out}")
    return out
