"""Strict YAML into typed objects: the configs of `diffkd train`, `diffkd distill` and `diffkd benchmark`."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator

from diffkd import method as methods
from diffkd.base import Positive, Strict, UserError
from diffkd.data import Data
from diffkd.method import Method
from diffkd.methods.denoising import Denoising
from diffkd.metrics.evaluation import Evaluation
from diffkd.models.unet2d import UNet2D
from diffkd.schedules import Schedule, from_diffusers
from diffkd.text import printable, quoted, reason
from diffkd.training import Training


class NoiseSchedule(Strict):
    """The noise schedule that a teacher is trained with."""

    beta_schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear"] = Field(
        "squaredcos_cap_v2", description="diffusers' name; squaredcos_cap_v2 is cosine"
    )
    num_train_timesteps: int = Field(
        1024, ge=2, le=100_000, description="T; students take step counts that divide it"
    )
    beta_start: float = Field(1e-4, gt=0, lt=1, description="of the linear schedules")
    beta_end: float = Field(0.02, gt=0, lt=1, description="of the linear schedules")
    zero_terminal_snr: bool = Field(True, description="whether the last step is pure noise")

    def build(self) -> Schedule:
        from diffusers import DDIMScheduler

        return from_diffusers(
            DDIMScheduler(
                num_train_timesteps=self.num_train_timesteps,
                beta_schedule=self.beta_schedule,
                beta_start=self.beta_start,
                beta_end=self.beta_end,
                rescale_betas_zero_snr=self.zero_terminal_snr,
            )
        )


class Train(Strict):
    """`diffkd train`: a teacher from images."""

    out: Path = Field(description="the run's folder")
    seed: int = Field(0, ge=0, description="of everything random")
    data: Data
    model: UNet2D = UNet2D()
    schedule: NoiseSchedule = NoiseSchedule()
    prediction: Literal["v_prediction", "epsilon", "sample"] = Field(
        "v_prediction", description="what it outputs"
    )
    classes: bool = Field(
        True, description="whether it is conditioned on the data's labels, where it has any"
    )
    denoising: Denoising = Denoising()
    training: Training = Training()
    evaluation: Evaluation | None = Field(Evaluation(), description="null for none")
    pictures: int = Field(64, ge=0, description="images of each model in samples/; 0 for none")


class Teacher(Strict):
    """Where the teacher comes from: one of the two."""

    path: str | None = Field(None, description="a diffusers pipeline, folder or hub id")
    train: Path | None = Field(
        None, description="a config of `diffkd train`, relative to this file; run first"
    )
    null_label: int | None = Field(
        None, ge=0, description="the label that means no class, where a pipeline has one"
    )

    @model_validator(mode="after")
    def _one(self) -> Teacher:
        if (self.path is None) == (self.train is None):
            raise ValueError("teacher needs either path (a pipeline) or train (a config to train one from)")
        return self


def _method(given: Any) -> Any:
    """{"name": ..., fields} -> the Method, or a list of such."""
    if isinstance(given, list) and not any(isinstance(one, list) for one in given):
        return [_method(one)[0] for one in given]
    if isinstance(given, Method):
        return [given]
    if not isinstance(given, Mapping):
        raise UserError(
            f"method {quoted(given)} is no mapping with a name; use one of {', '.join(methods.names())}"
        )
    kind = methods.find(str(given.get("name", "progressive")))
    try:
        return [kind.model_validate({key: value for key, value in given.items() if key != "name"})]
    except ValidationError as error:
        raise UserError(one_line(error, kind, "method")) from error


class Distill(Strict):
    """`diffkd distill`: students from a teacher."""

    out: Path = Field(description="the run's folder")
    seed: int = Field(0, ge=0, description="of everything random")
    teacher: Teacher
    data: Data
    method: Annotated[list[SerializeAsAny[Method]], BeforeValidator(_method)] = Field(
        min_length=1, description="one method or several, whose stages run one after another"
    )
    training: Training = Training()
    evaluation: Evaluation | None = Field(Evaluation(), description="null for none")
    pictures: int = Field(64, ge=0, description="images of each model in samples/; 0 for none")


class Measured(Strict):
    """One model of a benchmark, or the teacher that the others are compared with."""

    path: str = Field(description="a diffusers pipeline, folder or hub id")
    name: str | None = Field(None, description="in the table; default the last part of the path")
    steps: list[Positive] = Field([], description="step counts; default a student's own")
    guidance: float = Field(1.0, ge=0, description="guidance weight; 1 is none")
    null_label: int | None = Field(
        None, ge=0, description="the label that means no class, where a pipeline has one"
    )
    stock: bool = Field(False, description="drawn by the pipeline's own code and scheduler")

    @property
    def title(self) -> str:
        return printable(self.name or Path(self.path).name)


class Benchmark(Strict):
    """`diffkd benchmark`: models x steps x metrics, in one table."""

    out: Path = Field(description="the run's folder")
    models: list[Measured] = Field(min_length=1, description="what is measured")
    teacher: Measured | None = Field(None, description="what agreement is with")
    evaluation: Evaluation = Field(description="how; it has to name a reference")

    @model_validator(mode="after")
    def _whole(self) -> Benchmark:
        if self.evaluation.reference is None:
            raise ValueError(
                "config key evaluation.reference is missing; name what to compare with, such as digits"
            )
        titles = [model.title for model in self.models]
        for model in self.models:
            if titles.count(model.title) > 1 or len({*model.steps}) < len(model.steps):
                raise ValueError(f"models name {model.title} twice; give one another name, or other steps")
        agreeing = "agreement" in self.evaluation.metrics
        if agreeing and self.teacher is None:
            raise ValueError("config key teacher is missing, which the metric agreement is with; name it")
        if self.teacher is not None and not agreeing:
            raise ValueError(
                f"teacher {self.teacher.path} is for the metric agreement; add that, or leave it out"
            )
        return self


Config = TypeVar("Config", Train, Distill, Benchmark)


def load(path: Path, kind: type[Config], overrides: Sequence[str] = ()) -> Config:
    """A config file with `key.sub=value` overrides.

    Raises UserError, which for an unknown key names the nearest known one.
    """
    try:
        with path.open("rb") as stream:
            text = stream.read(MOST_BYTES + 1)
        content = _parsed(text)
    except OSError as error:
        raise UserError(f"config {path} cannot be read ({error.strerror}); give a YAML file") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"config {path} is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"config {path} holds no keys; see configs/ for examples")
    for override in overrides:
        _override(content, override)
    teacher = content.get("teacher")
    if isinstance(teacher, dict) and isinstance(teacher.get("train"), str):
        try:
            named = (path.parent / teacher["train"]).resolve()
        except ValueError as error:
            raise UserError(
                f"config key teacher.train is {quoted(teacher['train'])}, no path ({reason(error)})"
            ) from error
        teacher["train"] = str(named)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise UserError(one_line(error, kind)) from error


MOST_BYTES, MOST_VALUES, DEEPEST = 1 << 20, 100_000, 50  # of a config: a page of text is usual


class _Loader(yaml.SafeLoader):
    """YAML's plain values. A key given twice, and what would be immense once read, are errors with a line."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.depth == DEEPEST:
            raise yaml.YAMLError(f"more than {DEEPEST} levels within levels, {_line(self.peek_event())}")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_document(self, node: Any) -> Any:
        self._check(node, {})
        return super().construct_document(node)

    def _check(self, node: Any, sizes: dict[int, int]) -> int:
        """How many values a node is when its aliases are written out."""
        if id(node) in sizes:
            if not sizes[id(node)]:  # being counted
                raise yaml.YAMLError(f"an alias within what it stands for, {_line(node)}")
            return sizes[id(node)]
        sizes[id(node)] = 0
        inner = [node] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in keys:
                        raise yaml.YAMLError(
                            f"key {key.value} is given twice, {_line(key)}; keep one of them"
                        )
                    keys.add(key.value)
            inner = [one for pair in node.value for one in pair]
        size = 1 if inner == [node] else 1 + sum(self._check(one, sizes) for one in inner)
        if size > MOST_VALUES:
            raise yaml.YAMLError(f"more than {MOST_VALUES} values with aliases written out, {_line(node)}")
        sizes[id(node)] = size
        return size


def _line(node: Any) -> str:
    return f"line {node.start_mark.line + 1}"


def _parsed(text: bytes | str) -> Any:
    """What a YAML text says. Raises yaml.YAMLError or ValueError."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"it is longer than {MOST_BYTES >> 20} MiB")
    loader = _Loader(text.decode() if isinstance(text, bytes) else text)
    try:
        return loader.get_single_data()
    except (AttributeError, LookupError, TypeError, OverflowError) as error:  # PyYAML's own, as of "!!int ''"
        raise ValueError(f"a value that is none: {reason(error)}") from error
    finally:
        loader.dispose()


def resolved(config: Train | Distill | Benchmark) -> dict[str, Any]:
    """The config as plain data, every default written out; the run folder keeps it."""
    content = config.model_dump(mode="json")
    if isinstance(config, Distill):
        names = [type(m).__module__.removeprefix("diffkd.methods.") for m in config.method]
        content["method"] = [{"name": n, **m} for n, m in zip(names, content["method"], strict=True)]
    return content


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not of the form key.sub=value")
    place: Any = content
    *parents, last = key.split(".")
    for parent in parents:
        if isinstance(place, list) and _is_index(parent) and int(parent) < len(place):
            place = place[int(parent)]
            continue
        if not isinstance(place, dict):
            raise UserError(f"override {override!r}: {parent} is inside a value that has no keys")
        if not isinstance(place.get(parent), dict | list):
            place[parent] = {}
        place = place[parent]
    try:
        parsed = _parsed(value)
    except (yaml.YAMLError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"override {override!r} has a value that is no YAML ({why})") from error
    if isinstance(place, list):
        if not _is_index(last) or int(last) >= len(place):
            raise UserError(f"override {override!r}: a list is indexed by 0 to {len(place) - 1}")
        place[int(last)] = parsed
    elif isinstance(place, dict):
        place[last] = parsed
    else:
        raise UserError(f"override {override!r}: {key} is inside a value that has no keys")


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdigit()


def one_line(error: ValidationError, kind: type[Strict], prefix: str = "") -> str:
    """The first of pydantic's complaints as one line: the key, the value, the remedy."""
    order = ("extra_forbidden", "invalid_key")  # a misspelt key explains what else is wrong
    first = min(error.errors(), key=lambda one: one["type"] not in order)
    known, loc = _known(kind, first["loc"])
    key = ".".join(str(part) for part in ([prefix] if prefix else []) + loc)
    if first["type"] in order:
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]}?" if near else f"known here are {', '.join(known) or '(none)'}"
        return f"config key {key} is unknown; {remedy}"
    if first["type"] == "missing":
        return f"config key {key} is missing; add it (see configs/ for examples)"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message
    message = f"{message[0].lower()}{message[1:]}"
    if len(kinds := [tag for tag in map(_tag, _fields_at(kind, loc)) if tag]) > 1:
        message = f"it needs a kind, one of {', '.join(kinds)}"
    return f"config key {key} is {quoted(first['input'])}: {message}"


def _fields_at(kind: type[Strict], loc: Sequence[int | str]) -> list[type[Strict]]:
    """The config classes that the value at loc may be."""
    choices = [kind]
    for part in loc:
        fields = [c.model_fields[str(part)].annotation for c in choices if str(part) in c.model_fields]
        choices = [model for annotation in fields for model in _models(annotation)]
    return choices


def _known(kind: type[Strict], loc: Sequence[int | str]) -> tuple[list[str], list[int | str]]:
    """The keys of the object that loc ends in, and loc without pydantic's tags of union members."""
    path: list[int | str] = []
    choices: list[type[Strict]] = [kind]
    inside = False  # a value that has no keys
    for part in loc[:-1]:
        tagged = [c for c in choices if len(choices) > 1 and _tag(c) == part]
        if tagged:
            choices = tagged
            continue
        fields = [c.model_fields[str(part)].annotation for c in choices if str(part) in c.model_fields]
        if fields or isinstance(part, int):
            path.append(part)
        inside = inside or (bool(fields) and not [m for a in fields for m in _models(a)])
        choices = [model for annotation in fields for model in _models(annotation)] or choices
    if loc and not (inside and isinstance(loc[-1], str)):
        path.append(loc[-1])
    return [name for c in choices for name in c.model_fields], path


def _tag(kind: type[Strict]) -> Any:
    field = kind.model_fields.get("kind")
    return get_args(field.annotation)[0] if field is not None else None


def _models(annotation: Any) -> list[type[Strict]]:
    """The config classes in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return [annotation]
    if get_origin(annotation) in (Annotated, Union, types.UnionType, list):
        return [model for inner in get_args(annotation) for model in _models(inner)]
    return []
