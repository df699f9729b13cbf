"""What models are compared with: images, or a file with the statistics of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffkd.errors import UserError
from diffkd.io import files, naming
from diffkd.io.naming import called
from diffkd.io.npz import read_npz
from diffkd.io.processes import Processes
from diffkd.io.text import from_json, reason
from diffkd.metrics.base import FeatureSet, Labelled
from diffkd.metrics.evaluation.collector import Pixels
from diffkd.metrics.evaluation.feature_cache import features_of
from diffkd.metrics.evaluation.image_sets import File, images_of
from diffkd.metrics.evaluation.image_sources import Source, labels_in
from diffkd.metrics.features.resize import renamed
from diffkd.metrics.statistics import Statistics

MATCHING = ("name", "sha256", "num_features", "resize")  # of a feature network: what must be the same


NONE = "none"  # the name, and in records the spec, of no reference


class Reference:
    """Images, or statistics, or both; or nothing, for metrics that compare with nothing.

    name, count, size (width and height), sha256 (of the pixels), labels (N,): where they are known.
    """

    def __init__(
        self,
        spec: Any,
        source: Source | None = None,
        *,
        statistics: Statistics | None = None,
        cached: bool | str = True,
    ) -> None:
        """spec: of `image_sets.parse` or a config; None for no reference. source, statistics: its images, or
        their statistics, where they are open already. cached: whether features that an earlier command kept
        are used, and new ones kept; a folder to keep them in."""
        self.spec, self.cached = spec, cached
        self.statistics = statistics
        self.stored_features: Tensor | None = None
        self.protocol: dict[str, Any] = {}
        self.sha256: str | None = None
        self.labels: Tensor | None = None
        self.pixels: Pixels | None = None  # once its images were read
        self.from_cache = False
        self.source = source
        self.name: str = NONE
        self.count: int | None = None
        if statistics is not None:
            self.protocol = statistics.protocol
            self.name, self.sha256 = "statistics in memory", self.protocol.get("sha256")
        elif source is None and isinstance(spec, File):
            self._read(spec.path)
        elif source is None and spec is not None:
            with naming.reference():
                self.source = images_of(spec)
        if self.source is not None:
            self.labels = self.source.labels
            self.name = self.source.name
            self.count = len(self.source)
        if self.statistics is not None:
            self.count = self.statistics.num_samples  # and not of the images beside them, which may be fewer

    def _read(self, path: Path) -> None:
        arrays = read_npz(path)
        self.name = str(path)
        if "arr_0" in arrays:
            self.source = images_of(self.spec, arrays)
        if "mu" not in arrays and "sigma" not in arrays and self.source is not None:
            return
        self.statistics = Statistics.of_arrays(arrays, str(path))
        self.sha256 = files.sha256(path)
        if "protocol" in arrays:
            self.protocol = _protocol(arrays["protocol"], path)
            self.sha256 = self.protocol.get("sha256", self.sha256)
        count = self.statistics.num_samples
        if count is None:
            return  # another tool's, whose other arrays may mean anything
        if "features" in arrays:
            stored = arrays["features"]
            if stored.shape != (count, self.statistics.num_features):
                raise UserError(f"{path}: features do not fit num_samples and mu; write it with diffkd stats")
            if stored.dtype.kind != "f" or not np.isfinite(stored).all():
                raise UserError(f"{path}: features has values that are not finite numbers; write it again")
            self.stored_features = torch.from_numpy(stored)
        if self.source is None and "labels" in arrays:
            self.labels = labels_in(arrays, count, path)

    def collect(
        self,
        networks: Mapping[str, nn.Module],
        descriptions: Mapping[str, Mapping[str, Any]],
        store: set[str],
        processes: Processes,
        *,
        batch_size: int = 64,
        allow_mismatch: bool = False,
        on_images: Callable[[int], None] = lambda count: None,
    ) -> dict[str, FeatureSet]:
        """Statistics by each of these networks and features by those in `store`, in one pass over the images.

        The first of the networks is the one that a file's statistics are of. Raises UserError where they are
        of another, and where a file of statistics does not hold what is asked for.
        """
        missing = self.require(descriptions, store, allow_mismatch)
        known: dict[str, FeatureSet] = {}
        if self.statistics is not None:
            known[next(iter(networks))] = FeatureSet(self.statistics, self.stored_features)
        passed: dict[str, FeatureSet] = {}
        if missing:
            assert self.source is not None
            passed, self.pixels, self.from_cache = features_of(
                self.source, {n: networks[n] for n in missing}, descriptions, store, processes,
                batch_size=batch_size, cached=self.cached, on_images=on_images,
            )  # fmt: skip
            self.sha256 = self.sha256 or self.pixels.sha256
        return {
            name: FeatureSet(
                (known if name in known else passed)[name].statistics,
                (passed if name in passed else known)[name].stored,
                self.name,
            )
            for name in networks
        }

    def require(
        self, descriptions: Mapping[str, Mapping[str, Any]], store: set[str], allow_mismatch: bool = False
    ) -> list[str]:
        """The networks that its images have to be run through.

        Raises UserError where there are no images, and where the statistics of a file are by other features
        than the first described.
        """
        first = next(iter(descriptions))
        there = set()
        if self.statistics is not None:
            self._check(self.statistics, descriptions[first], allow_mismatch)
            there = {first} if first not in store or self.stored_features is not None else set()
        missing = [name for name in descriptions if name not in there]
        if missing and self.source is None:
            what = (
                "stored features" if missing[0] == first else f"{descriptions[missing[0]]['name']} statistics"
            )
            raise UserError(
                f"{self.name} holds no {what}, which a metric needs; give the images themselves, "
                "or a file of diffkd stats --store-features"
            )
        return missing

    def _check(self, statistics: Statistics, description: Mapping[str, Any], allow_mismatch: bool) -> None:
        wide = description["num_features"]
        if statistics.num_features != wide:
            raise UserError(
                f"{self.name} has {statistics.num_features} features and {description['name']} has "
                f"{wide}; use the feature network that it was made with"
            )
        known = self.protocol.get("features", {})
        differ = [
            f"{key} {known.get(key)} there, {description.get(key)} here"
            for key in MATCHING
            if known and known.get(key) != description.get(key)
        ]
        if differ and not allow_mismatch:
            raise UserError(
                f"{self.name} was made with other features ({'; '.join(differ)}); use the same, "
                f"or {called('evaluation.allow_mismatch')} for a number that cannot be compared"
            )

    @property
    def is_there(self) -> bool:
        return self.source is not None or self.statistics is not None

    @property
    def has_features(self) -> bool:
        """Whether every feature is there, or can be computed."""
        return self.source is not None or self.stored_features is not None

    @property
    def size(self) -> tuple[int, int] | None:
        if self.source is not None:
            return self.source.size
        size = self.protocol.get("size")
        return None if size is None else (size[0], size[1])

    @property
    def captions(self) -> Sequence[str]:
        """Of its images; [] where they have none."""
        return getattr(self.source, "captions", [])

    @property
    def notes(self) -> Sequence[str]:
        return () if self.source is None else self.source.notes

    def labels_of(self, classes: Sequence[str]) -> Tensor | None:
        """Its labels as a model numbers its `classes`, which may be in another order, or more; as they are
        where the names are not those."""
        own = () if self.source is None else self.source.classes
        if self.labels is None or not own or not set(own) <= set(classes):
            return self.labels
        return torch.tensor([classes.index(name) for name in own])[self.labels]

    @property
    def labelled(self) -> Labelled | None:
        """Its labels, with the names of their classes."""
        if self.labels is None:
            return None
        return Labelled(self.labels, () if self.source is None else self.source.classes)

    def describe(self) -> dict[str, Any]:
        """What a protocol says of it, after its images were collected."""
        spec: Any = self.spec.model_dump(mode="json") if self.spec is not None else NONE
        if "path" in spec and Path(spec["path"]).exists():
            spec["path"] = str(Path(spec["path"]).resolve())  # to be found from anywhere
        made_with = self.protocol.get("features") if self.statistics is not None else None
        return {
            "name": self.name, "count": self.count, "sha256": self.sha256, "features": made_with,
            "spec": spec,
        }  # fmt: skip


def _protocol(array: np.ndarray, path: Path) -> dict[str, Any]:
    try:
        content = from_json(str(array))
    except ValueError as error:
        raise UserError(
            f"{path}: its protocol is not JSON ({reason(error)}); write it with diffkd stats"
        ) from error
    if not (
        isinstance(content, dict)
        and isinstance(content.get("features", {}), dict)
        and isinstance(content.get("features", {}).get("name", ""), str)
        and isinstance(content.get("sha256"), str | None)
        and (content.get("size") is None or _is_size(content["size"]))
    ):
        raise UserError(f"{path}: its protocol was not written by diffkd; write it with diffkd stats")
    renamed(content.get("features"))
    return content


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(side) is int for side in value)
