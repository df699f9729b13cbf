"""What a model's images, or any others, are worth: every number with its whole protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffkd import samplers
from diffkd.base import Positive, Strict, UserError
from diffkd.denoiser import Denoiser
from diffkd.generation import generate, labels_for
from diffkd.metrics import features, sampling_error
from diffkd.metrics.agreement import Agreement
from diffkd.metrics.collect import Collector
from diffkd.metrics.frechet import distance
from diffkd.metrics.kernel import cmmd, kernel_distance
from diffkd.metrics.manifold import density_coverage, precision_recall
from diffkd.metrics.processes import Processes
from diffkd.metrics.reference import Reference
from diffkd.metrics.resize import Resize
from diffkd.metrics.sources import Source, Spec, batches
from diffkd.metrics.weights import digest
from diffkd.runs import commit, versions

MetricName = Literal["fid", "kid", "is", "prdc", "fd_inf", "fd_dino", "cmmd", "agreement"]
REMEMBERED = 1 << 30  # bytes of a teacher's images
MAIN, DINO, CLIP = (
    "main",
    "dinov2",
    "clip",
)  # feature networks: that of the config, and two for one metric each
STORED_REAL = {"kid": MAIN, "prdc": MAIN, "cmmd": CLIP}  # metrics that need every feature of the reference
STORED_FAKE = STORED_REAL | {"fd_inf": MAIN}  # and of what is measured


class Evaluation(Strict):
    """How models are measured."""

    features: str = Field(
        "digits", description="digits, inception, dinov2, clip, or an nn.Module's dotted path"
    )
    weights: str | None = Field(None, description="file or folder of the feature network's weights")
    resize: Resize | None = Field(None, description="of inception features; default tf1, as the original")
    dtype: Literal["float32", "float64"] | None = Field(
        None, description="of inception features; default float32"
    )
    metrics: list[MetricName] = Field(["fid"], min_length=1, description="what to compute")
    reference: Spec | None = Field(None, description="what to compare with; default the data of the run")
    samples: int | None = Field(
        None, ge=2, description="generated images; default as many as the reference has"
    )
    labels: Literal["data", "balanced"] | list[int] = Field(
        "data",
        description="class labels: the reference's own in order, every class in turn, or these in turn",
    )
    teacher_steps: list[Positive] = Field(
        [64], description="step counts of the teacher's curve, beside the students' own"
    )
    sampler: samplers.SamplerName = Field("ddim", description="of teacher and students")
    batch_size: int = Field(256, ge=1, description="images sampled at a time")
    seed: int = Field(0, ge=0, description="image i starts from the noise of seed + i")
    kid_subsets: int = Field(100, ge=1, description="subsets that KID is the mean over")
    kid_subset_size: int = Field(1000, ge=2, description="images in each")
    is_splits: int = Field(10, ge=1, description="parts that the Inception Score is the mean over")
    precision_k: int = Field(3, ge=1, description="nearest neighbour that precision and recall reach to")
    density_k: int = Field(5, ge=1, description="nearest neighbour that density and coverage reach to")
    bootstrap: int = Field(0, ge=0, description="resamplings for FID's 95% interval; 0 for none")
    dinov2_weights: str | None = Field(None, description="of fd_dino; default facebook/dinov2-large")
    clip_weights: str | None = Field(None, description="of cmmd; default openai/clip-vit-large-patch14-336")
    allow_mismatch: bool = Field(False, description="whether reference statistics by other features are used")


@dataclass
class Target:
    """What is measured: `count` images, by batches of this process. protocol: how they came about."""

    count: int
    batches: Callable[
        [int, int], Iterator[tuple[int, Tensor]]
    ]  # rank, world -> (index of the first, uint8 BHWC)
    protocol: dict[str, Any] = field(default_factory=dict)


def images_target(source: Source, count: int | None, batch_size: int) -> Target:
    """The first `count` of images that are there."""
    if count is not None and count > len(source):
        raise UserError(
            f"{source.name} has {len(source)} images and {count} are asked for; use fewer --samples"
        )
    total = count or len(source)
    return Target(total, lambda rank, world: batches(source, total, batch_size, rank, world))


def model_target(
    denoiser: Denoiser, how: Evaluation, reference: Reference, steps: int, *, guidance: float = 1.0
) -> Target:
    """Images that a model draws, as many as `how` says or the reference has."""
    count = how.samples or reference.count or features.USUAL
    chosen, given = _labels(denoiser, how, reference)
    labels = labels_for(denoiser, count, given)
    options: dict[str, Any] = {} if guidance == 1.0 else {"guidance": guidance}

    def drawn(rank: int, world: int) -> Iterator[tuple[int, Tensor]]:
        images = generate(
            denoiser, count, steps=steps, seed=how.seed, labels=labels, batch_size=how.batch_size,
            sampler=how.sampler, share=(rank, world), **options,
        )  # fmt: skip
        for number, batch in enumerate(images):
            yield (rank + number * world) * how.batch_size, batch

    return Target(count, drawn, {
        "steps": steps, "nfe": samplers.nfe(how.sampler, steps) * (1 if guidance == 1.0 else 2),
        "sampler": how.sampler, "guidance": guidance, "labels": chosen, "seed": how.seed,
        "clip": denoiser.clip, "dtype": str(denoiser.dtype).removeprefix("torch."),
    })  # fmt: skip


def remembered(target: Target) -> Target:
    """The same, drawn once and kept, unless it is more than REMEMBERED: a teacher that many students are
    compared with."""
    kept: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}

    def batches(rank: int, world: int) -> Iterator[tuple[int, Tensor]]:
        if (rank, world) in kept:
            yield from kept[rank, world]
            return
        drawn: list[tuple[int, Tensor]] | None = []
        for first, images in target.batches(rank, world):
            if drawn is not None:
                drawn.append((first, images))
                drawn = None if sum(len(x) for _, x in drawn) * images[0].numel() > REMEMBERED else drawn
            yield first, images
        if drawn is not None:
            kept[rank, world] = drawn

    return Target(target.count, batches, target.protocol)


def identity(denoiser: Denoiser, path: str, null_label: int | None = None) -> dict[str, Any]:
    """What a protocol says of a model, enough to open it again. null_label: where it had to be named."""
    place = Path(path).expanduser()
    where = {"kind": "model", "path": str(place.resolve()) if place.exists() else path}
    more = {} if null_label is None else {"null_label": null_label}
    return {**where, "sha256": digest(denoiser.network.state_dict()), **more}


def _labels(denoiser: Denoiser, how: Evaluation, reference: Reference) -> tuple[Any, Any]:
    """(what the protocol says of the labels, the labels)."""
    if denoiser.num_classes is None:
        return None, None
    if isinstance(how.labels, list):
        return how.labels, how.labels
    if how.labels == "data" and reference.labels is not None:
        return "data", reference.labels
    return "balanced", None


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
        names = {MAIN: how.features}
        names |= {DINO: "dinov2"} if "fd_dino" in how.metrics else {}
        names |= {CLIP: "clip"} if "cmmd" in how.metrics else {}
        self.networks: dict[str, Any] = {}
        for key, name in names.items():
            weights = {MAIN: how.weights, DINO: how.dinov2_weights, CLIP: how.clip_weights}[key]
            options: dict[str, Any] = {"resize": how.resize, "dtype": how.dtype} if key == MAIN else {}
            self.networks[key] = features.load(name, weights=weights, **options).to(processes.device)
        if "is" in how.metrics and not hasattr(self.networks[MAIN], "probabilities"):
            raise UserError(
                f"the Inception Score needs class probabilities, which {how.features} does not give"
            )
        self.descriptions = {k: features.describe(names[k], network) for k, network in self.networks.items()}
        stored = {STORED_REAL[metric] for metric in how.metrics if metric in STORED_REAL}
        self.real = reference.collect(
            self.networks, self.descriptions, stored, processes, batch_size=how.batch_size,
            allow_mismatch=how.allow_mismatch, on_images=on_images,
        )  # fmt: skip
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

    def few(self, samples: int) -> float | None:
        """The FID that a perfect model would have with so few images; None where they are not few."""
        usual = features.USUAL if self.how.features != "digits" else self.reference.count or features.USUAL
        if samples >= usual and samples >= self.real[MAIN].statistics.num_features:
            return None
        return sampling_error.floor(self.real[MAIN].statistics.sigma, samples)

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
