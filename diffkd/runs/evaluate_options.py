"""The options of `diffkd evaluate`, and what they mean: a target and a config."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from pydantic import ValidationError

from diffkd import metrics
from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.generation.labels import parse_classes
from diffkd.io.config import validation_message
from diffkd.io.naming import called
from diffkd.io.text import is_number
from diffkd.metrics import features
from diffkd.metrics.evaluation import presets
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.evaluation.image_sets import SETS
from diffkd.metrics.evaluation.image_sources import ArraySource
from diffkd.metrics.evaluation.reference import Reference
from diffkd.metrics.evaluation.targets import AGREEMENT_STEPS, Target, exists, is_model
from diffkd.models import guidance_kind

Measured = str | Denoiser | ArraySource  # a target by its name, a model that is open, images in memory


@dataclass(frozen=True)
class Options:
    """How `evaluate` measures, a field for each option of the command. None: not given, the default holds."""

    metrics: str = "fid"  # comma-separated
    steps: str | None = None  # comma-separated; default the student's own
    samples: int | None = None
    features: str | None = None
    weights: str | None = None
    feature_resize: str | None = None
    dtype: str | None = None
    resize: int | None = None
    split: str | None = None
    classes: str | None = None
    sampler: str | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float | None = None
    worse: str | None = None
    null_label: int | None = None
    quantize: str | None = None
    prompts: str | None = None
    variant: str | None = None
    scheduler: str | None = None
    teacher: str | None = None
    teacher_steps: int | None = None
    teacher_guidance: float | None = None
    bootstrap: int | None = None
    kid_subsets: int | None = None
    kid_subset_size: int | None = None
    is_splits: int | None = None
    dino_weights: str | None = None
    clip_weights: str | None = None
    clip_score_weights: str | None = None
    protocol: str | None = None
    seed: int | None = None
    batch_size: int | None = None
    allow_mismatch: bool = False
    cache: bool | str = True  # whether features of the reference are kept; a folder keeps those of both sets

    def given(self) -> list[str]:
        """Names of the options whose values are not the defaults."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]


# Options that mean something for a model only; and the config's names of those that are called otherwise.
OF_MODELS = ("steps", "classes", "sampler", "guidance", *guidance_kind.OPTIONS, "null_label", "quantize",
             "variant", "scheduler", "seed", "teacher", "teacher_steps", "teacher_guidance")  # fmt: skip
KEYS = {"feature_resize": "resize", "classes": "labels", "dino_weights": "dinov2_weights"}
OF_FILES = ("null_label", "quantize", "variant", "scheduler", *guidance_kind.OPTIONS)  # as a model is opened
OF_TEACHERS = ("teacher", "teacher_steps", "teacher_guidance")


def named(target: Measured) -> str:
    """What messages and records call it."""
    return target if isinstance(target, str) else target.name


def check(target: Measured, options: Options) -> None:
    """Raises UserError for an option that would do nothing."""
    images = isinstance(target, ArraySource)
    if isinstance(target, str):
        images = not is_model(target) and exists(target)
    chosen = [part.strip() for part in options.metrics.split(",")]
    if options.protocol == "coco30k":
        chosen.append("clip_score")  # where its weights are named
    owners = {key: kind.name for kind in metrics.kinds().values() for key in kind.model_fields}
    with_teacher = next(kind.name for kind in metrics.kinds().values() if kind.with_teacher)
    for name in options.given():
        if name in OF_MODELS and images:
            raise UserError(
                f"{option(name)} is for models, and {named(target)} is a set of images; leave it out"
            )
        if isinstance(target, Denoiser) and (name in OF_FILES or getattr(options, name) == "stock"):
            raise UserError(
                f"{option(name)} is for a model that is opened by its path, and {named(target)} is open; "
                "give the path, or leave it out"
            )
        owner = with_teacher if name in OF_TEACHERS else owners.get(KEYS.get(name, name))
        if owner is not None and owner not in chosen:
            raise UserError(f"{option(name)} is for the metric {owner}; add it to {option('metrics')}")


def check_without_reference(options: Options) -> None:
    """Raises UserError for a metric that compares with a reference, where there is none."""
    kinds = metrics.kinds()
    chosen = [part.strip() for part in options.metrics.split(",")]
    if any(name not in kinds or kinds[name].compares for name in chosen) or options.protocol:
        alone = ", ".join(name for name, kind in kinds.items() if not kind.compares)
        raise UserError(
            "say what to measure and against what: diffkd evaluate TARGET --reference REFERENCE (only "
            f"{option('metrics')} {alone} does without)"
        )


def option(name: str) -> str:
    """What it is called where it is given: an option of the command, or an argument in Python."""
    return called(name)


def target_of(target: Measured, options: Options) -> Target:
    kind = guidance_kind.of_options(options.guidance_interval, options.guidance_rescale, options.worse)
    if kind is not None:
        kind.check_weights([options.guidance])
    return Target(
        named(target), given=None if isinstance(target, str) else target, guidance_kind=kind,
        steps=parse_steps(options.steps), guidance=options.guidance,
        stock=options.sampler == "stock", resize=size_of(options), teacher=options.teacher,
        teacher_steps=_or(options.teacher_steps, AGREEMENT_STEPS),
        teacher_guidance=options.teacher_guidance, null_label=options.null_label,
        quantize=options.quantize, prompts=options.prompts,
        opening=_given(variant=options.variant, scheduler=options.scheduler),
    )  # fmt: skip


def config_of(options: Options, reference: Reference) -> Evaluation:
    """The config of these options. Raises UserError that names the option."""
    named = options.features or (None if options.protocol else default_features(reference))
    values = {
        "protocol": options.protocol,
        "features": features.locate(named) if named else None,
        "weights": options.weights,
        "resize": options.feature_resize, "dtype": options.dtype, "samples": options.samples,
        "metrics": [part.strip() for part in options.metrics.split(",")],
        "labels": parse_labels(_or(options.classes, "data")),
        "sampler": None if options.sampler == "stock" else options.sampler,
        "batch_size": _or(options.batch_size, 64), "seed": _or(options.seed, 0),
        "bootstrap": _or(options.bootstrap, 0), "dinov2_weights": options.dino_weights,
        "clip_weights": options.clip_weights, "clip_score_weights": options.clip_score_weights,
        "allow_mismatch": options.allow_mismatch,
    }  # fmt: skip
    keys = ("kid_subsets", "kid_subset_size", "is_splits")
    values |= {key: getattr(options, key) for key in keys if getattr(options, key) is not None}
    try:
        return Evaluation.model_validate(values)
    except ValidationError as error:
        if not error.errors()[0]["loc"]:  # of a value that is wrong in any field
            raise UserError(validation_message(error, Evaluation)) from error
        key = str(error.errors()[0]["loc"][0])
        name = option(next((name for name, other in KEYS.items() if other == key), key))
        line = validation_message(error, Evaluation).partition(" is ")[2]
        raise UserError(f"{name} is {line}{', or stock' * (key == 'sampler')}") from error


def size_of(options: Options) -> int | None:
    """Height and width that the images of folders are brought to. Raises UserError for an unknown protocol,
    and for another size than its own."""
    if options.protocol is None:
        return options.resize
    if options.protocol not in presets.PRESETS:
        raise UserError(
            f"{called('protocol')} {options.protocol!r} is unknown; use {', '.join(presets.PRESETS)}"
        )
    size = presets.PRESETS[options.protocol].size
    if size is None:
        return options.resize
    if options.resize not in (None, size):
        raise UserError(
            f"{option('resize')} {options.resize} is not what protocol {options.protocol} has, {size}; leave "
            "it out"
        )
    return size


def default_features(reference: Reference) -> str:
    """Where none are named: what a file's statistics are of, digits for digits, shapes for shapes,
    else inception.

    Raises UserError where they are of features that are not diffkd's own.
    """
    named = reference.protocol.get("features", {}).get("name")
    if named:
        features.check_named(named, reference.name)
    return str(named or (reference.name if reference.name in SETS else "inception"))


def parse_steps(text: str | None) -> tuple[int, ...]:
    """Step counts from text such as 1,2,4; none for the model's own."""
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    if not all(is_number(part) and int(part) > 0 for part in parts):
        raise UserError(f"{option('steps')} {text!r} is not understood; use step counts such as 1,2,4,8,64")
    return tuple(dict.fromkeys(int(part) for part in parts))


def parse_labels(text: str) -> str | list[int]:
    """data, balanced, or the labels of text such as 0-9."""
    if text in ("data", "balanced"):
        return text
    return parse_classes(text) or "balanced"


def _given(**options: str | None) -> dict[str, str]:
    return {key: value for key, value in options.items() if value is not None}


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
