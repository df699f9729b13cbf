"""The typed objects behind the config of `diffkd benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from diffkd.errors import printable
from diffkd.io.config import Positive, Strict
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.models.quantization import Quantize
from diffkd.runs.config import Opened, teacher_metric

Weight = Annotated[float, Field(ge=0)]


class BenchmarkEntry(Opened):
    """One model of a benchmark, or the teacher that the others are compared with."""

    path: str = Field(description="a diffusers pipeline, folder or hub id")
    name: str | None = Field(None, description="in the table; default the last part of the path")
    steps: list[Positive] = Field([], description="step counts; default a student's own")
    guidance: Annotated[
        list[Weight], BeforeValidator(lambda given: given if isinstance(given, list) else [given])
    ] = Field(
        [],
        description="guidance weights, one or a list, of which a plot shows a curve; 1 is none; default "
        "none, or the usual one of a model that takes it",
    )
    null_label: int | None = Field(
        None, ge=0, description="the label that means no class, where a pipeline has one"
    )
    quantize: Quantize | None = Field(None, description="int8: weights in 8 bits (extra quant)")
    stock: bool = Field(False, description="drawn by the pipeline's own code and scheduler")
    prompts: str | None = Field(None, description="a text file of prompts, for models that draw from them")

    @property
    def title(self) -> str:
        return printable(self.name or Path(self.path).name)

    @property
    def weights(self) -> list[float | None]:
        """Of its rows; None for the default."""
        return [*self.guidance] or [None]

    def rows(self, *, by_guidance: bool) -> list[tuple[int | None, float | None]]:
        """Steps and guidance of each row; None for what the model decides, or is not asked for."""
        every: list[int | None] = [*self.steps] or [None]
        return [(steps, w) for steps in every for w in (self.weights if by_guidance else [None])]


class Benchmark(Strict):
    """`diffkd benchmark`: models x steps x metrics, in one table."""

    out: Path = Field(description="the run's folder")
    models: list[BenchmarkEntry] = Field(min_length=1, description="what is measured")
    teacher: BenchmarkEntry | None = Field(None, description="what agreement is with")
    evaluation: Evaluation = Field(description="how to measure; it must name a reference")

    @model_validator(mode="after")
    def _consistent(self) -> Benchmark:
        if self.evaluation.reference is None:
            raise ValueError(
                "config key evaluation.reference is missing; name what to compare with, such as digits"
            )
        for model in self.models:  # those that share a name are one line of the plots
            namesakes = [entry for entry in self.models if entry.title == model.title]
            weighted = all(entry.guidance for entry in namesakes)
            rows = [row for entry in namesakes for row in entry.rows(by_guidance=weighted)]
            if len({*rows}) < len(rows) or (len(namesakes) > 1 and not all(e.steps for e in namesakes)):
                raise ValueError(
                    f"models name {model.title} twice; rename one of them, or give each different steps or "
                    "guidance"
                )
            if any(entry.guidance_kind != model.guidance_kind for entry in namesakes):
                raise ValueError(
                    f"models name {model.title} twice, with different kinds of guidance, which are no curve "
                    "of one model; rename one of them"
                )
        if self.teacher is not None and len(self.teacher.guidance) > 1:
            raise ValueError(
                f"teacher.guidance {self.teacher.guidance} is more than one weight, and agreement is with "
                "images of one; give one"
            )
        for entry in (*self.models, *([] if self.teacher is None else [self.teacher])):
            if entry.guidance_kind is not None:
                entry.guidance_kind.check_weights(entry.guidance)
        metric = teacher_metric(self.evaluation)
        if metric is not None and self.teacher is None:
            raise ValueError(f"config key teacher is missing, and the metric {metric} needs one; name it")
        if self.teacher is not None and metric is None:
            raise ValueError(
                f"teacher {self.teacher.path} is for a metric such as agreement; add one of those, or leave "
                "the teacher out"
            )
        return self
