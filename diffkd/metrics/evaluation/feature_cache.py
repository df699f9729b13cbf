"""Features of sets of images that earlier commands computed, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from diffkd.errors import UserError
from diffkd.io.environment import PACKAGE, versions
from diffkd.io.npz import read_npz
from diffkd.io.places import expanded, free_bytes
from diffkd.io.processes import Processes
from diffkd.io.text import from_json, log
from diffkd.metrics.base import FeatureSet
from diffkd.metrics.evaluation.collector import Collector, Pixels
from diffkd.metrics.evaluation.image_sources import Source, batches
from diffkd.metrics.statistics import Statistics

VARIABLE = "DIFFKD_CACHE"  # the folder, or "off"
LIMIT = 4 << 30  # bytes of all files; those that were used longest ago go first


class Known(NamedTuple):
    """The features of a set of images, and the sha256 of each image."""

    features: FeatureSet
    pixels: Pixels


def folder() -> Path | None:
    """Where features are kept; None for nowhere."""
    named = os.environ.get(VARIABLE, "")
    if named.lower() == "off":
        return None
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "diffkd")
    if str(base).startswith("~") and os.environ.get("HOME") == "":  # which would make it /.cache
        return None
    try:
        return expanded(base).absolute() / "features"
    except RuntimeError:  # there is no home
        return None


def features_of(
    source: Source,
    networks: Mapping[str, nn.Module],
    descriptions: Mapping[str, Mapping[str, Any]],
    store: Container[str],
    processes: Processes,
    *,
    batch_size: int,
    cached: bool,
    on_images: Callable[[int], None],
) -> tuple[dict[str, FeatureSet], Pixels, bool]:
    """The features of a set of images by each network, those of earlier commands where they were kept, the
    others in one pass; the images' digests; whether there was no pass.

    store: keys of the networks whose every feature is needed. descriptions: of `features.describe`.
    """
    count, keys, known = len(source), dict[str, str | None](), dict[str, Known]()
    if cached and folder() is not None:
        content = source.content()
        for name, network in networks.items():
            key = keys[name] = key_of(content, network, descriptions[name], batch_size, processes)
            found = key and load(key, count, stored=name in store, device=processes.device)
            if int(processes.add(torch.tensor(int(bool(found))))) == processes.world and found:
                known[name] = found  # in all processes, which need not share a cache
    left = {name: network for name, network in networks.items() if name not in known}
    if not left:
        return {name: k.features for name, k in known.items()}, next(iter(known.values())).pixels, True
    pixels = Pixels(count)
    collectors = {
        name: Collector(network, count, processes.device, store=name in store)
        for name, network in left.items()
    }
    for first, images in batches(source, count, batch_size, processes.rank, processes.world):
        pixels.update(first, images)
        on_device = images.to(processes.device)
        for collector in collectors.values():
            collector.update(first, on_device)
        on_images(len(images))
    pixels.merge_across(processes.add)
    for name, collector in collectors.items():
        collector.merge_across(processes.add)
        known[name] = Known(collector.collected(), pixels)
        if keys.get(name) and processes.main:
            save(str(keys[name]), known[name])
    return {name: known[name].features for name in networks}, pixels, False


def key_of(
    content: str, network: nn.Module, description: Mapping[str, Any], batch_size: int, processes: Processes
) -> str | None:
    """What features depend on to the last bit, as a digest; None for networks of the user's own, whose code
    may change without any trace in their weights. content: of `Source.content`."""
    if not type(network).__module__.startswith("diffkd."):
        return None
    device = processes.device
    made_by = {
        "images": content, "features": dict(description), "batch_size": batch_size, "world": processes.world,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(), "precision": torch.get_float32_matmul_precision(),
        "machine": _machine(), "versions": versions() | {"transformers": _version("transformers")},
        "code": _code(),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()


def load(key: str, count: int, *, stored: bool, device: torch.device) -> Known | None:
    """What `save` kept by that key; None where nothing can be used. stored: with all features."""
    place = folder()
    if place is None or not os.path.isfile(place / f"{key}.npz"):
        return None
    path = place / f"{key}.npz"
    try:
        wanted = {"mu", "sigma", "num_samples", "protocol", "images", *(["features"] if stored else [])}
        arrays = read_npz(path, wanted)
        if from_json(str(arrays["protocol"])) != {"key": key} or (stored and "features" not in arrays):
            return None
        read = Statistics.of_arrays(arrays, str(path))
        statistics = Statistics.of(read.mu.to(device), read.sigma.to(device), read.num_samples)
        features = torch.from_numpy(arrays["features"]).to(device) if stored else None
        digests = torch.from_numpy(arrays["images"])
        if statistics.num_samples != count or digests.shape != (count, 32) or digests.dtype != torch.uint8:
            return None
        if features is not None and features.shape != (count, statistics.num_features):
            return None
        os.utime(path)
    except (UserError, OSError, KeyError, ValueError) as error:
        log.debug("%s is of no use: %s", path, error)
        return None
    return Known(FeatureSet(statistics, features), Pixels(digests.long()))


def save(key: str, known: Known) -> None:
    """Keeps them for `load`, where there is room. A failure costs the next command time, and no more."""
    place, features = folder(), known.features.stored
    size = 8 * (known.features.statistics.num_features + 1) ** 2 + known.pixels.digests.numel()
    size += 0 if features is None else features.numel() * features.element_size()
    if place is None or size > LIMIT // 2:
        return
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if free_bytes(place) < 2 * size:
            return
        known.features.statistics.save(
            place / f"{key}.npz", protocol={"key": key}, images=known.pixels.digests.byte(), features=features
        )
        _forget(place, keep=f"{key}.npz")
    except OSError as error:
        log.debug("features are not kept in %s: %s", place, error)


def _forget(place: Path, keep: str) -> None:
    """Removes the files that were used longest ago, until all of them are within LIMIT."""
    files = [(path.stat(), path) for path in place.glob("*.npz")]
    total = sum(found.st_size for found, _ in files)
    for found, path in sorted(files, key=lambda file: file[0].st_mtime):
        if total > LIMIT and path.name != keep:
            path.unlink(missing_ok=True)
            total -= found.st_size


@cache
def _code() -> str:
    """Of all of diffkd: whatever is changed in it, features are computed again."""
    total = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()


@cache
def _machine() -> tuple[str, ...]:
    """The processor: another one may round otherwise, and home folders are shared."""
    lines: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    model = next((line for line in lines if line.startswith("model name")), platform.processor())
    return platform.machine(), model, torch.backends.cpu.get_cpu_capability()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
