"""One pass over images: the features of each, gathered as far as the metrics need them."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.core.precision import full_float32
from diffkd.errors import UserError
from diffkd.metrics.base import Add, Batch, FeatureSet, Metric
from diffkd.metrics.statistics import Statistics

BATCH = 128  # images that a feature network takes at a time, whatever the sampler's batches are


class Collector:
    """Gathers the features of `count` images: their statistics, and with `store` every one, (count, d)."""

    def __init__(self, network: nn.Module, count: int, device: torch.device, *, store: bool = False) -> None:
        self.network: Any = network
        self.num_features: int = getattr(network, "num_features")  # noqa: B009
        self.count, self.store, self.device = count, store, device
        dtype = next((p.dtype for p in network.parameters()), torch.float64)
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32  # of stored features
        self.statistics = Statistics(self.num_features, device)
        self.features: Tensor | None = None

    @torch.no_grad()
    def update(self, first: int, images: Tensor, known: Tensor | None = None) -> Tensor:
        """images: (B, H, W, C) uint8, `first` the index of the first. known: the features of all `count`
        images, where an earlier command computed them. Returns their features (B, d)."""
        features = self.of(images) if known is None else known[first : first + len(images)]
        self.statistics.update(features)
        if self.store:
            self._room()[first : first + len(features)] = features
        return features

    @torch.no_grad()
    def of(self, images: Tensor) -> Tensor:
        """Features (B, d) of images (B, H, W, C) uint8, without gathering them."""
        try:
            with full_float32(images.device.type):
                parts = [self.network(part.permute(0, 3, 1, 2)) for part in images.split(BATCH)]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            size = "x".join(map(str, images.shape[1:]))
            kind = type(self.network)
            raise UserError(
                f"the feature network {kind.__module__}.{kind.__qualname__} cannot take images of "
                f"{size} (height x width x channels): {str(error).splitlines()[0]}"
            ) from error
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def merge_across(self, add: Add) -> None:
        """Adds up all processes, each of which must call it, with images or without."""
        self.statistics.merge_across(add)
        if self.store:
            self.features = add(self._room())  # each row is of one process, 0 elsewhere

    def collected(self) -> FeatureSet:
        return FeatureSet(self.statistics, self.features)

    def _room(self) -> Tensor:
        if self.features is None:
            shape = (self.count, self.num_features)
            self.features = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return self.features


class Collection:
    """What metrics need of `count` images, gathered in one pass: features by each network, computed once, and
    what metrics add up themselves. stored: keys of the networks whose every feature is kept."""

    def __init__(
        self,
        metrics: Sequence[Metric],
        networks: Mapping[str, nn.Module],
        count: int,
        device: torch.device,
        stored: Container[str],
        known: Mapping[str, Tensor] | None = None,
    ) -> None:
        """known: features of all images by these networks, which are not computed again."""
        self.known = known or {}
        self.metrics = metrics
        self.collectors = {
            key: Collector(network, count, device, store=key in stored) for key, network in networks.items()
        }
        started = {m.name: m.running(networks[m.network], count, device) for m in metrics}
        self.running = {name: running for name, running in started.items() if running is not None}

    def update(
        self,
        first: int,
        images: Tensor,
        by_teacher: Tensor | None = None,
        prompts: Sequence[str] | None = None,
    ) -> None:
        """images, by_teacher: (B, H, W, C) uint8 of one shape; the teacher's if a metric compares with it."""
        features = {
            key: collector.update(first, images, self.known.get(key))
            for key, collector in self.collectors.items()
        }
        for metric in self.metrics:
            if metric.name in self.running:
                collector = self.collectors[metric.network]
                theirs = None if by_teacher is None or not metric.with_teacher else collector.of(by_teacher)
                batch = Batch(first, images, features[metric.network], by_teacher, theirs, prompts)
                self.running[metric.name].update(batch)

    def merge_across(self, add: Add) -> None:
        """Adds up all processes, each of which must call it, with images or without."""
        for collector in self.collectors.values():
            collector.merge_across(add)
        for running in self.running.values():
            running.merge_across(add)

    def features(self) -> dict[str, FeatureSet]:
        return {key: collector.collected() for key, collector in self.collectors.items()}


class Pixels:
    """The sha256 of each of a set's images, (count, 32) of 0 to 255, whatever process read which."""

    def __init__(self, digests: int | Tensor) -> None:
        """digests: those that are known, or their count."""
        self.digests = torch.zeros(digests, 32, dtype=torch.int64) if isinstance(digests, int) else digests

    def update(self, first: int, images: Tensor) -> None:
        """images: (B, H, W, C) uint8 on the CPU."""
        for i, image in enumerate(images.contiguous().numpy()):
            digest = hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).digest()
            self.digests[first + i] = torch.tensor(list(digest))

    def merge_across(self, add: Add) -> None:
        """Adds up all processes, each of which must call it, with images or without."""
        self.digests = add(self.digests)

    @property
    def sha256(self) -> str:
        """Of the set: of the digests in order."""
        return hashlib.sha256(bytes(self.digests.flatten().tolist())).hexdigest()

    @property
    def copies(self) -> int:
        """Images that are the same as an earlier one."""
        return len(self.digests) - len(set(self._rows()))

    def in_common(self, other: Pixels) -> int:
        """Images that are also in another set."""
        theirs = set(other._rows())
        return sum(digest in theirs for digest in self._rows())

    def _rows(self) -> list[bytes]:
        return [bytes(digest) for digest in self.digests.byte().numpy()]
