"""Features on the disk, a file for each key: in the user's cache folder, or in another that was named."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NamedTuple

import torch

from diffkd.errors import UserError
from diffkd.io.npz import read_npz
from diffkd.io.places import expanded, free_bytes
from diffkd.io.text import from_json, log
from diffkd.metrics.base import FeatureSet
from diffkd.metrics.evaluation.collector import Pixels
from diffkd.metrics.statistics import Statistics

VARIABLE = "DIFFKD_CACHE"  # the folder, or "off"
LIMIT = 4 << 30  # bytes of all files; those that were used longest ago go first


class Known(NamedTuple):
    """The features of a set of images, and the sha256 of each image."""

    features: FeatureSet
    pixels: Pixels


def place_of(cached: bool | str) -> Path | None:
    """Where features are kept, and looked for: the folder that is named, the user's cache for True; None for
    nowhere."""
    if isinstance(cached, str):
        return expanded(cached).absolute()
    return folder() if cached else None


def folder() -> Path | None:
    """The user's cache; None where there is none."""
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


def load(key: str, count: int, place: Path, *, stored: bool, device: torch.device) -> Known | None:
    """What `save` kept by that key; None where nothing can be used. stored: with all features."""
    path = place / f"{key}.npz"
    if not os.path.isfile(path):
        return None
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


def save(key: str, known: Known, place: Path) -> None:
    """Keeps them for `load`, where there is room: in the user's cache within LIMIT, in a folder that was
    named without one. A failure costs the next command time, and no more."""
    features, own = known.features.stored, place == folder()
    size = 8 * (known.features.statistics.num_features + 1) ** 2 + known.pixels.digests.numel()
    size += 0 if features is None else features.numel() * features.element_size()
    if own and size > LIMIT // 2:
        return
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if free_bytes(place) < 2 * size:
            return
        known.features.statistics.save(
            place / f"{key}.npz", protocol={"key": key}, images=known.pixels.digests.byte(), features=features
        )
        if own:
            _forget(place, keep=f"{key}.npz")
    except OSError as error:
        log.log(logging.DEBUG if own else logging.WARNING, "features are not kept in %s: %s", place, error)


def _forget(place: Path, keep: str) -> None:
    """Removes the files that were used longest ago, until all of them are within LIMIT."""
    files = [(path.stat(), path) for path in place.glob("*.npz")]
    total = sum(found.st_size for found, _ in files)
    for found, path in sorted(files, key=lambda file: file[0].st_mtime):
        if total > LIMIT and path.name != keep:
            path.unlink(missing_ok=True)
            total -= found.st_size
