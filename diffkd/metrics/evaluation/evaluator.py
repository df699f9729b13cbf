"""What a set of images is worth: every number with its whole protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.errors import UserError
from diffkd.generation.timing import Stopwatch
from diffkd.io.environment import commit, versions
from diffkd.io.processes import Processes
from diffkd.metrics import features, sampling_error
from diffkd.metrics.agreement import Agreement
from diffkd.metrics.evaluation.collector import SPLIT_SEED, Collector, Pixels
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.evaluation.image_stream import ImageStream
from diffkd.metrics.evaluation.reference import Reference
from diffkd.metrics.frechet import distance
from diffkd.metrics.kernel import cmmd, kernel_distance
from diffkd.metrics.prdc import density_coverage, precision_recall

MAIN, DINO, CLIP = "main", "dinov2", "clip"  # feature networks: the config's, and two for a metric each
STORED_REAL = {"kid": MAIN, "prdc": MAIN, "cmmd": CLIP}  # metrics that need every feature of the reference
STORED_FAKE = STORED_REAL | {"fd_inf": MAIN}  # and of what is measured


def names_of(how: Evaluation) -> dict[str, str]:
    """The feature networks that the metrics need: that of the config first."""
    names = {MAIN: how.features}
    names |= {DINO: "dinov2"} if "fd_dino" in how.metrics else {}
    return names | ({CLIP: "clip"} if "cmmd" in how.metrics else {})


def networks_of(how: Evaluation) -> dict[str, nn.Module]:
    """These networks, loaded. UserError where one cannot be had, or does not give what a metric needs."""
    weights = {MAIN: how.weights, DINO: how.dinov2_weights, CLIP: how.clip_weights}
    networks = {}
    for key, name in names_of(how).items():
        options: dict[str, Any] = {"resize": how.resize, "dtype": how.dtype} if key == MAIN else {}
        networks[key] = features.load(name, weights=weights[key], **options)
    if "is" in how.metrics and not hasattr(networks[MAIN], "probabilities"):
        raise UserError(f"the Inception Score needs class probabilities, which {how.features} does not give")
    return networks


def stored_real(how: Evaluation) -> set[str]:
    """The networks whose features of the reference have to be kept."""
    return {STORED_REAL[metric] for metric in how.metrics if metric in STORED_REAL}


def require(how: Evaluation, reference: Reference) -> None:
    """Raises UserError where a feature network or the reference cannot give what the metrics need."""
    names = names_of(how)
    described = {key: features.describe(names[key], network) for key, network in networks_of(how).items()}
    reference.require(described, stored_real(how), how.allow_mismatch)


class Evaluator:
    """Measures one set of images after another against one reference, whose part is done once."""

    def __init__(
        self,
        how: Evaluation,
        reference: Reference,
        processes: Processes,
        on_images: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.how, self.reference, self.processes = how, reference, processes
        names = names_of(how)
        self.networks: dict[str, Any] = {k: n.to(processes.device) for k, n in networks_of(how).items()}
        self.descriptions = {k: features.describe(names[k], network) for k, network in self.networks.items()}
        self.real = reference.collect(
            self.networks, self.descriptions, stored_real(how), processes, batch_size=how.batch_size,
            allow_mismatch=how.allow_mismatch, on_images=on_images,
        )  # fmt: skip
        self._floors: dict[int, float] = {}
        self._gaussians = {key: c.statistics.gaussian(reference.name) for key, c in self.real.items()}

    def __call__(
        self,
        target: ImageStream,
        *,
        teacher: ImageStream | None = None,
        on_images: Callable[[int], None] = lambda count: None,
    ) -> dict[str, Any]:
        """{"steps", "nfe", the values, "seconds", "protocol"}. teacher: what draws from the same noise."""
        how, device, add = self.how, self.processes.device, self.processes.add
        if "agreement" not in how.metrics:
            teacher = None
        elif teacher is None:
            raise UserError("agreement is with a teacher from the same noise; name it (--teacher)")
        stored = {STORED_FAKE[metric] for metric in how.metrics if metric in STORED_FAKE}
        if how.bootstrap:
            stored.add(MAIN)
        collectors = {
            key: Collector(
                network, target.count, device, store=key in stored,
                splits=how.is_splits if key == MAIN and "is" in how.metrics else None,
            )
            for key, network in self.networks.items()
        }  # fmt: skip
        main = collectors[MAIN]
        agreement = Agreement(main.num_features, device)
        pixels = Pixels(target.count)
        watch = Stopwatch(device)
        for first, batch, by_teacher in self._pairs(target, teacher, watch):
            if target.there:
                pixels.update(first, batch)
            images = batch.to(device)
            found = {key: collector.update(first, images) for key, collector in collectors.items()}
            if by_teacher is not None:
                by_teacher = by_teacher.to(device)
                if by_teacher.shape != images.shape:
                    raise UserError(
                        f"the teacher {teacher and teacher.protocol.get('path', '')} draws images of "
                        f"{_size(by_teacher)} and the model of {_size(images)} (height x width x channels); "
                        "agreement needs a teacher of the same size"
                    )
                agreement.update(images, by_teacher, found[MAIN], main.of(by_teacher))
            on_images(len(batch))
        for collector in collectors.values():
            collector.merge_across(add)
        if teacher is not None:
            agreement.merge_across(add)
        if target.there:
            target.protocol["pixels"] = pixels.sha256(add)
        made: dict[str, Any] = {k: target.protocol[k] for k in ("steps", "nfe") if k in target.protocol}
        values = self._values(collectors, agreement) if self.processes.main else {}
        return {**made, **values, "seconds": watch.seconds(), "protocol": self._protocol(target, teacher)}

    def _pairs(
        self, target: ImageStream, teacher: ImageStream | None, watch: Stopwatch
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """(index of the first, images, the teacher's of the same noise) of this process."""
        place = self.processes.rank, self.processes.world
        drawn = watch(target.batches(*place))
        if teacher is None:
            for first, images in drawn:
                yield first, images, None
        else:
            for (first, images), (_, by_teacher) in zip(drawn, teacher.batches(*place), strict=True):
                yield first, images, by_teacher

    def _values(self, collectors: dict[str, Collector], agreement: Agreement) -> dict[str, Any]:
        how, main, reference = self.how, collectors[MAIN], self._gaussians[MAIN]
        options = self._options(main.count)
        values: dict[str, Any] = {}
        for metric in dict.fromkeys(how.metrics):
            given = options[metric]
            if metric == "fid":
                values["fid"] = distance(main.statistics.gaussian(), reference)
                floor = self._floor(main.count)
                values |= {} if floor is None else {"fid_floor": floor}
                if how.bootstrap:
                    interval = sampling_error.bootstrap(main.stored(), reference, draws=how.bootstrap)
                    values |= {"fid_low": interval.low, "fid_high": interval.high, "fid_std": interval.std}
            elif metric == "kid":
                kid = kernel_distance(main.stored(), self._real(MAIN), **given)
                values |= {"kid": kid.mean, "kid_std": kid.std}
            elif metric == "is" and main.score is not None:
                score = main.score.score()
                values |= {"is": score.mean, "is_std": score.std}
            elif metric == "prdc":
                real, fake = self._real(MAIN), main.stored()
                values |= precision_recall(real, fake, given["precision_k"])._asdict()
                values |= density_coverage(real, fake, given["density_k"])._asdict()
            elif metric == "fd_inf":
                line = sampling_error.frechet_infinity(main.stored(), reference, **given)
                values |= {"fd_inf": line.value, "fd_inf_slope": line.slope}
            elif metric == "fd_dino":
                values["fd_dino"] = distance(collectors[DINO].statistics.gaussian(), self._gaussians[DINO])
            elif metric == "cmmd":
                values["cmmd"] = cmmd(self._real(CLIP), collectors[CLIP].stored(), **given)
            elif metric == "agreement":
                values |= agreement.result()
        return values

    def _real(self, key: str) -> Tensor:
        stored = self.real[key].features
        assert stored is not None
        return stored.to(self.processes.device)

    def _floor(self, samples: int) -> float | None:
        """The FID that fresh data would have with so few images; None where they are not few."""
        real = self.real[MAIN].statistics
        usual = (
            features.STANDARD_SAMPLES
            if self.how.features != "digits"
            else self.reference.count or features.STANDARD_SAMPLES
        )
        if samples >= usual and samples >= real.num_features:
            return None
        if samples not in self._floors:
            self._floors[samples] = sampling_error.floor(real.sigma, samples, real.num_samples)
        return self._floors[samples]

    def _protocol(self, target: ImageStream, teacher: ImageStream | None) -> dict[str, Any]:
        how, device = self.how, self.processes.device
        return {
            "features": self.descriptions[MAIN],
            "more_features": {key: d for key, d in self.descriptions.items() if key != MAIN},
            "samples": target.count, "reference": self.reference.describe(),
            "metrics": self._options(target.count),
            **target.protocol, "teacher": teacher.protocol if teacher else None,
            "batch_size": how.batch_size, "device": device.type, "processes": self.processes.world,
            "threads": torch.get_num_threads(), "versions": versions(), "commit": commit(),
            "evaluation": self._located(),
        }  # fmt: skip

    def _located(self) -> dict[str, Any]:
        """The config, with places that can be found from anywhere."""
        content = self.how.model_dump(mode="json")
        for key in ("weights", "dinov2_weights", "clip_weights"):
            if content[key] is not None and Path(content[key]).expanduser().exists():
                content[key] = str(Path(content[key]).expanduser().resolve())
        return content | {"reference": None}  # it is in the protocol already

    def _options(self, count: int) -> dict[str, Any]:
        """What each metric's number depends on beside the features, as it is given to its function."""
        how = self.how
        size = min(how.kid_subset_size, count, self.reference.count or count)
        every: dict[str, Any] = {
            "fid": {}, "is": {"splits": how.is_splits, "seed": SPLIT_SEED},
            "kid": {"subsets": how.kid_subsets, "subset_size": size, "degree": 3, "seed": 0},
            "prdc": {"precision_k": how.precision_k, "density_k": how.density_k},
            "fd_inf": {"points": 15, "smallest": 0.1, "seed": 0}, "fd_dino": {},
            "cmmd": {"bandwidth": 10.0, "scale": 1000.0}, "agreement": {},
        }  # fmt: skip
        return {name: every[name] for name in how.metrics}


def _size(images: Tensor) -> str:
    return "x".join(map(str, images.shape[1:]))
