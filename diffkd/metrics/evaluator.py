"""What a set of images is worth: every number with its whole protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.base import UserError
from diffkd.metrics import features, sampling_error
from diffkd.metrics.agreement import Agreement
from diffkd.metrics.collect import Collector
from diffkd.metrics.evaluation import Evaluation
from diffkd.metrics.frechet import distance
from diffkd.metrics.kernel import cmmd, kernel_distance
from diffkd.metrics.manifold import density_coverage, precision_recall
from diffkd.metrics.processes import Processes
from diffkd.metrics.reference import Reference
from diffkd.metrics.targets import Target
from diffkd.runs import commit, versions

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
        stored = {STORED_REAL[metric] for metric in how.metrics if metric in STORED_REAL}
        self.real = reference.collect(
            self.networks, self.descriptions, stored, processes, batch_size=how.batch_size,
            allow_mismatch=how.allow_mismatch, on_images=on_images,
        )  # fmt: skip
        self._floors: dict[int, float] = {}
        self._gaussians = {key: c.statistics.gaussian(reference.name) for key, c in self.real.items()}

    def __call__(
        self,
        target: Target,
        *,
        teacher: Target | None = None,
        on_images: Callable[[int], None] = lambda count: None,
    ) -> dict[str, Any]:
        """{"steps", "nfe", the values, "seconds", "protocol"}. teacher: what draws from the same noise."""
        how = self.how
        if "agreement" in how.metrics and teacher is None:
            raise UserError("agreement is with a teacher from the same noise; name it")
        stored = {STORED_FAKE[m] for m in how.metrics if m in STORED_FAKE} | (
            {MAIN} if how.bootstrap else set()
        )
        collectors = {
            key: Collector(
                network, target.count, self.processes.device, store=key in stored,
                splits=how.is_splits if key == MAIN and "is" in how.metrics else None,
            )
            for key, network in self.networks.items()
        }  # fmt: skip
        main = collectors[MAIN]
        agreement = Agreement(main.statistics.num_features, self.processes.device) if teacher else None
        place = self.processes.rank, self.processes.world
        teaching = teacher.batches(*place) if teacher else None
        watch = Stopwatch(self.processes.device)
        for first, batch in watch(target.batches(*place)):
            images = batch.to(self.processes.device)
            found = {key: collector.update(first, images) for key, collector in collectors.items()}
            if teaching is not None and agreement is not None:
                by_teacher = next(teaching)[1].to(self.processes.device)
                agreement.update(images, by_teacher, found[MAIN], main.of(by_teacher))
            on_images(len(batch))
        for collector in collectors.values():
            collector.merge_across(self.processes.add)
        values = self._values(collectors)
        if agreement is not None:
            agreement.merge_across(self.processes.add)
            values |= agreement.result()
        made: dict[str, Any] = {
            key: target.protocol[key] for key in ("steps", "nfe") if key in target.protocol
        }
        return {**made, **values, "seconds": watch.seconds(), "protocol": self._protocol(target, teacher)}

    def _values(self, collectors: dict[str, Collector]) -> dict[str, Any]:
        how, main = self.how, collectors[MAIN]
        values: dict[str, Any] = {}
        for metric in dict.fromkeys(how.metrics):
            if metric == "fid":
                values["fid"] = distance(main.statistics.gaussian(), self._gaussians[MAIN])
                floor = self._floor(main.count)
                values |= {} if floor is None else {"fid_floor": floor}
                if how.bootstrap:
                    interval = sampling_error.bootstrap(
                        main.stored(), self._gaussians[MAIN], draws=how.bootstrap, seed=how.seed
                    )
                    values |= {"fid_low": interval.low, "fid_high": interval.high, "fid_std": interval.std}
            elif metric == "kid":
                kid = kernel_distance(
                    main.stored(), self._real(MAIN), subsets=how.kid_subsets, subset_size=how.kid_subset_size
                )
                values |= {"kid": kid.mean, "kid_std": kid.std}
            elif metric == "is" and main.score is not None:
                score = main.score.score()
                values |= {"is": score.mean, "is_std": score.std}
            elif metric == "prdc":
                values |= precision_recall(self._real(MAIN), main.stored(), how.precision_k)._asdict()
                values |= density_coverage(self._real(MAIN), main.stored(), how.density_k)._asdict()
            elif metric == "fd_inf":
                line = sampling_error.frechet_infinity(main.stored(), self._gaussians[MAIN])
                values |= {"fd_inf": line.value, "fd_inf_slope": line.slope}
            elif metric == "fd_dino":
                values["fd_dino"] = distance(collectors[DINO].statistics.gaussian(), self._gaussians[DINO])
            elif metric == "cmmd":
                values["cmmd"] = cmmd(self._real(CLIP), collectors[CLIP].stored())
        return values

    def _real(self, key: str) -> Tensor:
        stored = self.real[key].features
        assert stored is not None
        return stored.to(self.processes.device)

    def _floor(self, samples: int) -> float | None:
        """The FID that a perfect model would have with so few images; None where they are not few."""
        usual = features.USUAL if self.how.features != "digits" else self.reference.count or features.USUAL
        if samples >= usual and samples >= self.real[MAIN].statistics.num_features:
            return None
        if samples not in self._floors:
            self._floors[samples] = sampling_error.floor(self.real[MAIN].statistics.sigma, samples)
        return self._floors[samples]

    def _protocol(self, target: Target, teacher: Target | None) -> dict[str, Any]:
        how, device = self.how, self.processes.device
        return {
            "features": self.descriptions[MAIN],
            "more_features": {key: d for key, d in self.descriptions.items() if key != MAIN},
            "samples": target.count, "reference": self.reference.describe(),
            "metrics": self._options(target.count),
            **target.protocol, "teacher": teacher.protocol if teacher else None,
            "batch_size": how.batch_size, "device": device.type, "processes": self.processes.world,
            "threads": torch.get_num_threads(), "versions": versions(), "commit": commit(),
            "evaluation": how.model_dump(mode="json"),
        }  # fmt: skip

    def _options(self, count: int) -> dict[str, Any]:
        """What each metric's number depends on beside the features."""
        how = self.how
        size = min(how.kid_subset_size, count, self.reference.count or count)
        every: dict[str, Any] = {
            "fid": {"bootstrap": how.bootstrap}, "is": {"splits": how.is_splits},
            "kid": {"subsets": how.kid_subsets, "subset_size": size, "degree": 3, "seed": 0},
            "prdc": {"precision_k": how.precision_k, "density_k": how.density_k},
            "fd_inf": {"points": 15, "smallest": 0.1, "seed": 0}, "fd_dino": {},
            "cmmd": {"bandwidth": 10, "scale": 1000}, "agreement": {},
        }  # fmt: skip
        return {name: every[name] for name in how.metrics}


class Stopwatch:
    """Seconds that an iterator takes to give its items, without waiting for the device in between."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[Any, Any]] = []

    def __call__(self, items: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        while True:
            started = self._now()
            item = next(items, None)
            self.marks.append((started, self._now()))
            if item is None:
                return
            yield item

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        if self.device.type != "cuda":
            return float(sum(b - a for a, b in self.marks))
        torch.cuda.synchronize()
        return float(sum(a.elapsed_time(b) for a, b in self.marks)) / 1000
