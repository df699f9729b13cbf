"""`diffkd evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffkd.cli.options import (
    Device,
    Dtype,
    FeatureResize,
    Features,
    ImageSize,
    Quantized,
    Split,
    Weights,
    prepare_libraries,
)

# Options of `diffkd evaluate` that mean something for a model only, or with a metric: it refuses them else.
OF_MODELS = ("steps", "classes", "sampler", "guidance", "null_label", "quantize", "seed", "teacher",
             "teacher_steps", "teacher_guidance")  # fmt: skip
OF_METRICS = {
    "teacher": "agreement", "teacher_steps": "agreement", "teacher_guidance": "agreement",
    "bootstrap": "fid", "dino_weights": "fd_dino", "clip_weights": "cmmd",
}  # fmt: skip
OF_REPEAT = ("repeat", "device", "features")


def evaluate(
    context: typer.Context,
    target: Annotated[
        str | None, typer.Argument(help="A model (folder or hub id), a folder of images, or an image .npz.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="digits, a folder of images, an .npz of images or statistics, or a data set."),
    ] = None,
    steps: Annotated[str | None, typer.Option(help="Such as 1,2,4,8,64; default the student's own.")] = None,
    metrics: Annotated[
        str, typer.Option(help="Of fid, kid, is, prdc, fd_inf, fd_dino, cmmd, agreement; comma-separated.")
    ] = "fid",
    samples: Annotated[
        int | None, typer.Option(min=2, help="Images; default as many as the reference has, or 50000.")
    ] = None,
    features: Features = None,
    weights: Weights = None,
    feature_resize: FeatureResize = None,
    dtype: Dtype = None,
    resize: ImageSize = None,
    split: Split = "train",
    classes: Annotated[
        str, typer.Option(help="Labels: data (the reference's, else balanced), balanced, or such as 0-9.")
    ] = "data",
    sampler: Annotated[
        str, typer.Option(help="ddim, heun, dpmpp_2m, ancestral, or stock: the pipeline's own code.")
    ] = "ddim",
    guidance: Annotated[float, typer.Option("-w", "--guidance", min=0, help="1 is none.")] = 1.0,
    null_label: Annotated[
        int | None, typer.Option(min=0, help="The label that means no class, where a pipeline has one.")
    ] = None,
    quantize: Quantized = None,
    teacher: Annotated[
        str | None, typer.Option(help="Of agreement: the model to draw the same noise with.")
    ] = None,
    teacher_steps: Annotated[int, typer.Option(min=1, help="Its steps.")] = 64,
    teacher_guidance: Annotated[float, typer.Option(min=0, help="Its guidance weight.")] = 1.0,
    bootstrap: Annotated[
        int, typer.Option(min=0, help="Resamplings for a 95% interval of FID; 0 for none, 200 is usual.")
    ] = 0,
    dino_weights: Annotated[
        str | None, typer.Option(help="Of fd_dino; default facebook/dinov2-large.")
    ] = None,
    clip_weights: Annotated[
        str | None, typer.Option(help="Of cmmd; default openai/clip-vit-large-patch14-336.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Image i starts from the noise of seed + i.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    device: Device = None,
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Use reference statistics that other features made.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write the records to this JSON file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the records as JSON, nothing else.")] = False,
    repeat: Annotated[
        Path | None, typer.Option(help="Measure again what a record says, from the record alone.")
    ] = None,
) -> int | None:
    """Measure a model or images: FID and friends, each number with its whole protocol."""
    from rich.console import Console

    prepare_libraries()
    from diffkd.errors import UserError
    from diffkd.metrics.evaluation import targets
    from diffkd.runs import evaluate as evaluating

    given = [
        name for name in context.params
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]  # fmt: skip
    if repeat is not None:
        more = [name for name in given if name not in OF_REPEAT]
        if more:
            raise UserError(f"--repeat takes all from the record; leave out {_option(more[0])}")
        same = evaluating.repeat(repeat, Console(), device=device, features_name=features)
        return 0 if same else 1
    if target is None or reference is None:
        raise UserError("say what to measure and against what: diffkd evaluate TARGET --reference REF")
    asked = [part.strip() for part in metrics.split(",")]
    for name in given:
        if name in OF_MODELS and not targets.is_model(target) and targets.exists(target):
            raise UserError(f"{_option(name)} is for models, and {target} is a set of images; leave it out")
        if name in OF_METRICS and OF_METRICS[name] not in asked:
            raise UserError(f"{_option(name)} is for the metric {OF_METRICS[name]}; add it to --metrics")
    compared = evaluating.reference_of(reference, resize=resize, split=split)
    subject = targets.Target(
        target, steps=evaluating.parse_steps(steps), guidance=guidance, stock=sampler == "stock",
        resize=resize, teacher=teacher, teacher_steps=teacher_steps, teacher_guidance=teacher_guidance,
        null_label=null_label, quantize=quantize,
    )  # fmt: skip
    how = evaluating.evaluation(
        features=features or evaluating.usual_features(compared), weights=weights, resize=feature_resize,
        dtype=dtype, metrics=asked, samples=samples, labels=evaluating.parse_labels(classes),
        sampler="ddim" if sampler == "stock" else sampler, batch_size=batch_size, seed=seed,
        bootstrap=bootstrap, dinov2_weights=dino_weights, clip_weights=clip_weights,
        allow_mismatch=allow_mismatch,
    )  # fmt: skip
    evaluating.evaluate(subject, how, compared, Console(), device=device, out=out, as_json=json)
    return 0


def _option(name: str) -> str:
    return {"target": "the target", "guidance": "--guidance"}.get(name, f"--{name.replace('_', '-')}")
