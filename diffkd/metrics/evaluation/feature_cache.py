"""Features of sets of images that earlier commands computed, found again by all that they depend on."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffkd.errors import UserError
from diffkd.io.environment import PACKAGE, versions
from diffkd.io.naming import called
from diffkd.io.places import expanded
from diffkd.io.processes import Processes
from diffkd.metrics.base import FeatureSet
from diffkd.metrics.evaluation.collector import Collector, Pixels
from diffkd.metrics.evaluation.feature_files import Known, load, place_of, save
from diffkd.metrics.evaluation.image_sources import Source, batches


def features_of(
    source: Source,
    networks: Mapping[str, nn.Module],
    descriptions: Mapping[str, Mapping[str, Any]],
    store: Container[str],
    processes: Processes,
    *,
    batch_size: int,
    cached: bool | str,
    on_images: Callable[[int], None],
) -> tuple[dict[str, FeatureSet], Pixels, bool]:
    """The features of a set of images by each network, those of earlier commands where they were kept, the
    others in one pass; the images' digests; whether there was no pass.

    store: keys of the networks whose every feature is needed. descriptions: of `features.describe`. cached:
    of `place_of`.
    """
    count, keys, known = len(source), dict[str, str | None](), dict[str, Known]()
    place = place_of(cached)
    if isinstance(cached, str):
        store = networks  # whichever set these images are of the next time
    if place is not None:
        keys = keys_of(source.content(), networks, descriptions, batch_size, processes)
        known = kept(place, keys, count, store, processes)
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
        keep(place, keys.get(name), known[name], processes)
    return {name: known[name].features for name in networks}, pixels, False


def keys_of(
    content: str,
    networks: Mapping[str, nn.Module],
    descriptions: Mapping[str, Mapping[str, Any]],
    batch_size: int,
    processes: Processes,
) -> dict[str, str | None]:
    """`key_of` each network."""
    return {
        name: key_of(content, network, descriptions[name], batch_size, processes)
        for name, network in networks.items()
    }


def kept(
    place: Path, keys: Mapping[str, str | None], count: int, store: Container[str], processes: Processes
) -> dict[str, Known]:
    """What is kept there by these keys, as far as all processes find it: they need not share a folder."""
    known = {}
    for name, key in keys.items():
        found = key and load(key, count, place, stored=name in store, device=processes.device)
        if int(processes.add(torch.tensor(int(bool(found))))) == processes.world and found:
            known[name] = found
    return known


def keep(place: Path | None, key: str | None, known: Known, processes: Processes) -> None:
    """Saves what was computed, in the main process."""
    if place is not None and key and processes.main:
        save(key, known, place)


class Keeper:
    """Features of images that are measured, every one by each network, in a folder that the user named.

    known: those that earlier commands computed.
    """

    def __init__(
        self,
        cached: str,
        content: str,
        count: int,
        networks: Mapping[str, nn.Module],
        descriptions: Mapping[str, Mapping[str, Any]],
        batch_size: int,
        processes: Processes,
    ) -> None:
        """Raises UserError for networks of the user's own, which are not kept."""
        self.place, self.processes = expanded(cached).absolute(), processes
        self.keys = keys_of(content, networks, descriptions, batch_size, processes)
        if None in self.keys.values():
            raise UserError(
                f"{called('cache')} {cached} keeps no features of a network of your own, whose code may "
                "change unseen; leave it out"
            )
        found = kept(self.place, self.keys, count, networks, processes)
        self.known = {name: one.features.features for name, one in found.items()}

    def keep(self, features: Mapping[str, FeatureSet], pixels: Pixels) -> None:
        """Those that were not known before."""
        for name, found in features.items():
            if name not in self.known:
                keep(self.place, self.keys[name], Known(found, pixels), self.processes)


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
