"""Models measured by one feature network; the records are kept in the metrics.json of their runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rich.console import Console

from comparison.plan import Comparison, Features, Run
from diffkd.data.images import Images
from diffkd.io.files import append_json, read_records
from diffkd.io.processes import Processes
from diffkd.metrics.base import MAIN
from diffkd.metrics.evaluation import networks
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.evaluation.image_sources import DataSource
from diffkd.metrics.evaluation.image_stream import default_count
from diffkd.metrics.evaluation.records import Record
from diffkd.metrics.evaluation.reference import Reference
from diffkd.metrics.evaluation.targets import AGREEMENT_STEPS, Target
from diffkd.metrics.features import locate
from diffkd.runs.measurement import Measurement

VALUES = ("fid", "kid", "precision", "recall", "density", "coverage", "psnr")
ROLE = "evaluated"


@dataclass(frozen=True)
class Model:
    """The teacher, or a student. run: the folder of its run. follows: whether one noise determines its image,
    so that it is compared with the teacher's of that noise."""

    run: Path
    path: Path
    steps: int
    guidance: float = 1.0
    follows: bool = False

    @property
    def title(self) -> str:
        return f"{self.run.name}, {self.path.name} at {self.steps} steps and guidance {self.guidance:g}"


def teachers(comparison: Comparison) -> list[Model]:
    """At its step counts, guided and not. What students are compared with comes first, and is drawn once."""
    place, own = (comparison.training.out, comparison.teacher), (AGREEMENT_STEPS, comparison.guidance)
    weights = dict.fromkeys([comparison.guidance, 1.0])
    return [Model(*place, n, w, (n, w) == own) for w in weights for n in comparison.teacher_steps]


def student(run: Run, name: str, steps: int, drawn: str) -> Model:
    return Model(run.folder, run.folder / "students" / name, steps, follows=steps == 1 or drawn == "ddim")


class Measures:
    """By one feature network, on the comparison's data; by its first one also how near students come to the
    teacher. samples: images of a model, default as many as the data has."""

    def __init__(
        self, comparison: Comparison, features: Features, images: Images, samples: int | None
    ) -> None:
        self.comparison, self.features, self.samples = comparison, locate(features.name), samples
        self.with_teacher = features == comparison.features[0]
        self.reference = Reference(comparison.training.data, DataSource(images))
        plain = self._config(False)
        described = networks.load(plain, plain.chosen()).descriptions[MAIN]
        self.described = json.loads(json.dumps(described))
        self.count = default_count(plain, self.reference)
        self._of = cache(self._measurement)

    def _config(self, agreement: bool) -> Evaluation:
        names = ["fid", "kid", "prdc", *["agreement"] * agreement]
        return Evaluation(features=self.features, metrics=names, samples=self.samples)

    def _measurement(self, agreement: bool) -> Measurement:
        """One for all models: the teacher's images, which many are compared with, are drawn once."""
        return Measurement(self._config(agreement), self.reference, Processes("cpu"), Console(quiet=True))

    def find(self, model: Model) -> Record | None:
        """The record of a model that was measured so before."""
        chosen = {metric.name for metric in self._config(self._compared(model)).chosen()}
        wanted = {
            "features": self.described, "samples": self.count, "steps": model.steps, "seed": 0,
            "guidance": model.guidance,
        }  # fmt: skip
        for record in read_records(model.run / "metrics.json"):
            protocol = record.get("protocol", {})
            same = all(protocol.get(key) == value for key, value in wanted.items())
            path = protocol.get("target", {}).get("path")
            if same and path == str(model.path.resolve()) and protocol["metrics"].keys() == chosen:
                return dict(record)
        return None

    def _compared(self, model: Model) -> bool:
        return model.follows and self.with_teacher

    def measure(self, models: Sequence[Model]) -> None:
        """Those that were not measured yet."""
        for model in models:
            if self.find(model) is None:
                compared = self._compared(model)
                teacher = {
                    "teacher": str(self.comparison.teacher), "teacher_steps": AGREEMENT_STEPS,
                    "teacher_guidance": self.comparison.guidance,
                }  # fmt: skip
                target = Target(
                    str(model.path), steps=(model.steps,), guidance=model.guidance,
                    **(teacher if compared else {}),
                )  # fmt: skip
                [record] = self._of(compared).records(target)
                append_json(model.run / "metrics.json", {**record, "role": ROLE})
                print(f"{model.title}: FID {record['fid']:.3f}", flush=True)
