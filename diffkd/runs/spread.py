"""The spread of what a student draws while it trains, against that of the data: a collapse is seen at once.

Distribution matching and adversarial training can lead a student to draw ever fewer images, with losses that
look well. So at every so many updates it draws some from always the same noises, and the variance of their
features within a class is compared with the data's. Nothing of it reaches training: no random number, no
gradient, no state of a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.core import samplers
from diffkd.core.denoiser import GUIDANCE, INTERVAL, Denoiser
from diffkd.core.noise import derived_seed
from diffkd.data.absent import Unseen
from diffkd.data.images import Images
from diffkd.data.latents import Conditions
from diffkd.generation.labels import proportional
from diffkd.generation.pixels import to_pixels
from diffkd.io.text import from_json, log
from diffkd.methods.base import Stage
from diffkd.metrics import features
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.evaluation.image_sources import subset as chosen
from diffkd.metrics.features.digits import MAX_SIDE
from diffkd.runs.session import Session
from diffkd.training.run_files import LOG

EVENT = "spread"  # in the log
FEW_STEPS = 4  # at most, of students that are watched: drawing with more would be a part of the training
DRAWN = 128  # images at a time, two of each label
LOOKED_AT = 2048  # images of the data
FALLEN, FLOOR = 0.5, 0.15  # low is below half the best of the stage, or this share of the data's
RISING = 1.05  # times its best since it was low: a student that gains spread is on its way, however low
PATIENCE, STUCK = 2, 4  # looks in a row at a low spread until it is said: of a fallen one, of any


def within_classes(x: Tensor, labels: Tensor | None) -> float:
    """The variance of features around the means of their classes, summed over features, without bias: (N, d)
    and (N,) labels; around the one mean without labels. NaN where no class has two."""
    x = x.double()
    if labels is None:
        labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
    _, number, counts = labels.to(x.device).unique(return_inverse=True, return_counts=True)
    means = x.new_zeros(len(counts), x.shape[1]).index_add_(0, number, x) / counts[:, None]
    free = len(x) - len(counts)
    return float((x - means[number]).square().sum() / free) if free else float("nan")


class Watch:
    """The looks at one stage: what was seen, in order. It warns once."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.best, self.peak, self.low, self.warned = 0.0, 0.0, 0, False  # peak: the best since it was low

    def see(self, ratio: float, update: int, *, warn: bool = True) -> None:
        """ratio: the student's spread, of the data's. warn: False where it was seen, and said, before."""
        fallen = ratio < FALLEN * self.best
        low = fallen or ratio < FLOOR
        rising = 0 < self.peak < ratio / RISING  # chance takes a collapsed student up and down
        self.low = self.low + 1 if low and not rising and update else 0
        self.peak = max(self.peak, ratio) if low else 0.0
        self.best = max(self.best, ratio)
        if self.low >= (PATIENCE if fallen else STUCK) and not self.warned:
            self.warned = True
            if warn:
                log.warning(
                    "stage %s: at update %d what the student draws has %.2f of the data's spread (%.2f at "
                    "its best) and gains none: it collapses; a lower method.learning_rate may prevent it",
                    self.stage, update, ratio, self.best,
                )  # fmt: skip


class SpreadWatch:
    """Looks at the students of one run.

    every: how many updates there are between two looks. conditional: whether the students take labels.
    images: the data; without any, images of the teacher stand for them, which `teacher` draws, given how
    many and their labels.
    """

    def __init__(
        self,
        session: Session,
        every: int,
        evaluation: Evaluation | None,
        conditional: bool,
        images: Images | Unseen,
        teacher: Callable[[int, Tensor | None], Iterable[Tensor]],
        cache: Conditions | None = None,
    ) -> None:
        self.session, self.every, self.evaluation = session, every, evaluation
        self.conditional, self.images, self.teacher = conditional, images, teacher
        self.cache = cache  # of a model of latents, which are looked at in place of images

    def of_stage(self, stage: Stage, index: int, student: Denoiser) -> Callable[[int], None] | None:
        """Looks at the student as it begins; what is to be called with the number of updates done, by every
        process. None for a stage of many steps."""
        if stage.steps is None or stage.steps > FEW_STEPS:
            return None
        first = self._ratio(student, stage)
        watch: Watch | None = None

        def look(done: int) -> None:
            nonlocal watch
            if done % self.every:
                return
            if watch is None:
                watch = Watch(stage.name)
                before = [(record[EVENT], record["update"]) for record in self._records(index)]
                for ratio, update in [(first, 0), *before]:
                    watch.see(ratio, update, warn=False)
            ratio = self._ratio(student, stage)
            if math.isfinite(ratio):
                place = {"stage": stage.name, "stage_index": index, "update": done}
                self.session.run.append({"event": EVENT, **place, EVENT: ratio})
                self.session.told.on_log(self.session.update, {**place, EVENT: ratio})
                watch.see(ratio, done)

        return look

    def _ratio(self, student: Denoiser, stage: Stage) -> float:
        """The student's spread, of the data's. NaN in other processes than the main one, where the data has
        no spread, and where what is drawn is not finite, with which training itself ends."""
        drawn = self._drawn(student, stage)
        if not self.session.main or drawn is None or not self._of_data > 0:
            return math.nan
        return self._spread(drawn, self._labels) / self._of_data

    def _records(self, index: int) -> list[dict[str, Any]]:
        """The earlier looks at a stage, by the log: those after the checkpoint that it resumes are gone."""
        path = self.session.run.folder / LOG
        if not self.session.main or not path.exists():
            return []
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if f'"{EVENT}"' in line]
        return [record for record in map(from_json, lines) if record["stage_index"] == index]

    @property
    def _labels(self) -> Tensor | None:
        """Of what is drawn: in the data's proportion, each twice, so that every class has a spread however
        many there are."""
        if not self.conditional:
            return None
        return proportional(self.images.class_counts, DRAWN // 2).repeat_interleave(2)

    def _drawn(self, student: Denoiser, stage: Stage) -> list[Tensor] | None:
        """Images from always the same noises, as the student is drawn at the stage's end."""
        assert stage.steps is not None
        generator = torch.Generator().manual_seed(derived_seed(self.session.seed, *EVENT.encode()))
        shape = self.images.shape if self.cache is None else self.cache.shape
        noise, labels = torch.randn(DRAWN, *shape, generator=generator), self._labels
        drawn = []
        training, processes = self.session.training, self.session.accelerator.num_processes
        eager = torch.compiler.set_stance("force_eager") if training.compile else nullcontext()
        with torch.no_grad(), torch.random.fork_rng(), eager:  # whatever its layers draw
            for part in torch.arange(DRAWN).split(training.batch_size // training.parts(processes)):
                cond: dict[str, Any] = {} if labels is None else {"class_labels": labels[part]}
                if self.cache is not None and self.cache.embeddings is not None:
                    cond = self.cache.asked(chosen(len(self.cache), DRAWN)[part])
                if stage.interval:
                    cond[INTERVAL] = torch.full((len(part),), 1 / stage.steps, dtype=torch.float64)
                if student.guidance_range is not None:
                    cond[GUIDANCE] = torch.full((len(part),), student.usual_guidance)
                x0 = samplers.find(stage.drawn)(
                    student, student.schedule.from_noise(noise[part].to(student.device)),
                    samplers.grid(stage.steps), clip=None,
                    noise=lambda x: torch.randn(x.shape, generator=generator).to(x.device),
                    **{key: value.to(student.device) for key, value in cond.items()},
                )  # fmt: skip
                pixels, finite = to_pixels(x0)
                if not finite:
                    return None
                drawn.append(pixels if self.cache is None else x0)
        return drawn

    @cached_property
    def _of_data(self) -> float:
        images = self.images
        if isinstance(images, Unseen):
            return self._spread(self.teacher(DRAWN, self._labels), self._labels)
        if self.cache is not None:
            rng, main = torch.Generator().manual_seed(derived_seed(self.session.seed)), self.cache.main
            batches = [main.batch(DRAWN, rng) for _ in range(0, LOOKED_AT, DRAWN)]
            given = [cond["class_labels"] for _, cond in batches] if self.conditional else []
            return self._spread((x0 for x0, _ in batches), torch.cat(given) if given else None)
        chosen = torch.arange(0, len(images), -(-len(images) // LOOKED_AT))
        labels = images.labels[chosen] if self.conditional and images.labels is not None else None
        parts = (images.uint8(part).permute(0, 2, 3, 1) for part in chosen.split(DRAWN))
        return self._spread(parts, labels)

    @torch.no_grad()
    def _spread(self, batches: Iterable[Tensor], labels: Tensor | None) -> float:
        """batches: uint8 (B, H, W, C), or latents (B, C, H, W)."""
        device = self.session.accelerator.device
        if self.cache is not None:
            return within_classes(torch.cat([pooled(x0.to(device)) for x0 in batches]), labels)
        found = [self._network(batch.to(device).permute(0, 3, 1, 2)) for batch in batches]
        return within_classes(torch.cat(found), labels)

    @cached_property
    def _network(self) -> nn.Module:
        """The evaluation's own features, unless they are of digits where these are none, or of a network too
        large to sit beside one that trains."""
        evaluation, shape = self.evaluation, self.images.shape
        name = "" if evaluation is None else evaluation.features
        others = name == "digits" and (shape[0] != 1 or max(shape) > MAX_SIDE)
        if evaluation is None or others or name in ("dinov2", "clip"):
            return Pooled()
        options = {"weights": evaluation.weights, "dtype": evaluation.dtype}
        network = features.load(name, resize=evaluation.resize, **options)
        return network.to(self.session.accelerator.device)


class Pooled(nn.Module):
    """Colours of at most 8x8 parts of an image: features that need no network."""

    def forward(self, images: Tensor) -> Tensor:
        return pooled(images.float() / 127.5 - 1)


def pooled(x: Tensor) -> Tensor:
    """Means of at most 8x8 parts: (B, C, H, W) -> (B, d)."""
    height, width = x.shape[2:]
    return F.adaptive_avg_pool2d(x, (min(8, height), min(8, width))).flatten(1)
