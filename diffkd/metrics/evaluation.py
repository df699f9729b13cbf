"""A model's FID with its whole protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import Field
from torch import Tensor

from diffkd import samplers
from diffkd.base import Positive, Strict
from diffkd.data import Images
from diffkd.denoiser import Denoiser
from diffkd.generation import generate, labels_for
from diffkd.metrics import features
from diffkd.metrics.fid import FID
from diffkd.runs import commit, versions


class Evaluation(Strict):
    """How models are measured."""

    features: str = Field("digits", description="feature network: digits, or the dotted path of an nn.Module")
    samples: int | None = Field(None, ge=2, description="generated images; default as many as the data has")
    teacher_steps: list[Positive] = Field(
        [64], description="step counts of the teacher's curve, beside the students' own"
    )
    sampler: samplers.SamplerName = Field("ddim", description="of teacher and students")
    batch_size: int = Field(256, ge=1, description="images sampled at a time")
    seed: int = Field(0, ge=0, description="image i starts from the noise of seed + i")


class Evaluator:
    """Measures models against one data set: class labels are the data's own, in order."""

    def __init__(self, evaluation: Evaluation, images: Images, device: Any) -> None:
        self.evaluation = evaluation
        self.images = images
        network = features.load(evaluation.features)
        self.description = features.describe(evaluation.features, network)
        reference = (images.uint8(slice(i, i + 256)).permute(0, 2, 3, 1) for i in range(0, len(images), 256))
        self.fid = FID(network, reference, device)
        self.reference = {"name": images.name, "count": self.fid.count, "sha256": images.sha256()}

    def __call__(
        self,
        denoiser: Denoiser,
        steps: int,
        *,
        guidance: float = 1.0,
        on_images: Callable[[int], None] = lambda count: None,
    ) -> dict[str, Any]:
        """{"fid", "steps", "nfe", "seconds", "protocol"} of a model sampled in so many steps."""
        how = self.evaluation
        count = how.samples or len(self.images)
        labels = None if denoiser.num_classes is None else labels_for(denoiser, count, self.images.labels)
        options: dict[str, Any] = {} if guidance == 1.0 else {"guidance": guidance}
        seconds = 0.0

        def batches() -> Iterator[Tensor]:
            nonlocal seconds
            started = time.perf_counter()
            for batch in generate(
                denoiser, count, steps=steps, seed=how.seed, labels=labels, batch_size=how.batch_size,
                sampler=how.sampler, **options,
            ):  # fmt: skip
                seconds += time.perf_counter() - started
                on_images(len(batch))
                yield batch
                started = time.perf_counter()

        value = self.fid(batches())
        nfe = samplers.nfe(how.sampler, steps) * (1 if guidance == 1.0 else 2)
        protocol = {
            "features": self.description, "samples": count, "reference": self.reference, "seed": how.seed,
            "labels": None if labels is None else "data", "sampler": how.sampler, "steps": steps, "nfe": nfe,
            "guidance": guidance, "clip": denoiser.clip, "batch_size": how.batch_size,
            "dtype": str(denoiser.dtype).removeprefix("torch."), "device": denoiser.device.type,
            "versions": versions(), "commit": commit(),
        }  # fmt: skip
        return {"steps": steps, "nfe": nfe, "fid": value, "seconds": seconds, "protocol": protocol}
