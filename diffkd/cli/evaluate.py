"""`diffkd evaluate`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from diffkd.cli.completion import METRICS, SAMPLERS, TOOLS, among
from diffkd.cli.options import (
    Cache,
    CacheFolder,
    Device,
    Dtype,
    FeatureResize,
    Features,
    GuidanceInterval,
    GuidanceRescale,
    ImageSize,
    NoiseScheduler,
    Quantized,
    Split,
    Variant,
    Weights,
    Worse,
    cache_of,
    prepare_libraries,
)


def evaluate(
    target: Annotated[
        str | None, typer.Argument(help="A model (folder or hub id), a folder of images, or an image .npz.")
    ] = None,
    against: Annotated[
        str | None, typer.Argument(help="What to compare with, as --reference names it.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="digits, shapes, a folder, an .npz of images or statistics, or a data set."),
    ] = None,
    steps: Annotated[str | None, typer.Option(help="Such as 1,2,4,8,64; default the student's own.")] = None,
    metrics: Annotated[
        str,
        typer.Option(
            help="Of fid, class_fid, kid, is, prdc, fd_inf, fd_dino, cmmd, clip_score, prompt_accuracy, "
            "agreement; comma-separated.",
            autocompletion=among(*METRICS),
        ),
    ] = "fid",
    samples: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Images of a model, default as many as the reference has, at most 50000; of a folder or an "
            ".npz, default all, else a fixed random choice.",
        ),
    ] = None,
    features: Features = None,
    weights: Weights = None,
    feature_resize: FeatureResize = None,
    dtype: Dtype = None,
    resize: ImageSize = None,
    split: Split = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="Labels: data (default; the reference's, else balanced), balanced, or such as 0-9."
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="ddim, heun, dpmpp_2m, ancestral, renoise, or stock: the pipeline's own code. Default: the "
            "model's own.",
            autocompletion=among(*SAMPLERS, "stock"),
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            "-w",
            "--guidance",
            min=0,
            help="Guidance weight; default 1, which is none, or the usual one of a model that takes it.",
        ),
    ] = None,
    guidance_interval: GuidanceInterval = None,
    guidance_rescale: GuidanceRescale = None,
    worse: Worse = None,
    null_label: Annotated[
        int | None, typer.Option(min=0, help="The label that means no class, where a pipeline has one.")
    ] = None,
    quantize: Quantized = None,
    prompts: Annotated[
        str | None, typer.Option(help="A text file of prompts, one a line, for the images in turn.")
    ] = None,
    variant: Variant = None,
    scheduler: NoiseScheduler = None,
    teacher: Annotated[
        str | None, typer.Option(help="Of agreement: the model to draw the same noise with.")
    ] = None,
    teacher_steps: Annotated[int | None, typer.Option(min=1, help="Its steps; default 64.")] = None,
    teacher_guidance: Annotated[
        float | None, typer.Option(min=0, help="Its guidance weight; default as for the model.")
    ] = None,
    bootstrap: Annotated[
        int | None,
        typer.Option(min=0, help="Resamplings for a 95% interval of FID; default none, 200 is usual."),
    ] = None,
    kid_subsets: Annotated[int | None, typer.Option(min=1, help="Of kid; default 100.")] = None,
    kid_subset_size: Annotated[
        int | None,
        typer.Option(min=2, help="Images in each; default 1000, or a whole set, which has no spread."),
    ] = None,
    is_splits: Annotated[int | None, typer.Option(min=1, help="Of is; default 10.")] = None,
    dino_weights: Annotated[
        str | None, typer.Option(help="Of fd_dino; default facebook/dinov2-large.")
    ] = None,
    clip_weights: Annotated[
        str | None, typer.Option(help="Of cmmd; default openai/clip-vit-large-patch14-336.")
    ] = None,
    clip_score_weights: Annotated[
        str | None, typer.Option(help="Of clip_score; default openai/clip-vit-large-patch14.")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol",
            "--preset",
            help="coco30k: FID at 256x256 of an image for each of 30,000 captions (--prompts), and with "
            "--clip-score-weights the CLIP score. pytorch-fid, clean-fid, torch-fidelity, edm, adm: FID as "
            "that tool has it.",
            autocompletion=among("coco30k", *TOOLS),
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Image i starts from the noise of seed + i; default 0.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images at a time; default 64.")] = None,
    device: Device = None,
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Use reference statistics that other features made.")
    ] = False,
    cache: Cache = True,
    cache_folder: CacheFolder = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the records to this JSON file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the records as JSON, nothing else.")] = False,
    repeat: Annotated[
        Path | None, typer.Option(help="Measure again what a record says, from the record alone.")
    ] = None,
) -> int:
    """Measure a model or images: FID and friends, each number with its whole protocol."""
    from rich.console import Console

    prepare_libraries()
    from diffkd.errors import UserError
    from diffkd.runs import evaluate as job
    from diffkd.runs import evaluate_options
    from diffkd.runs import repeat as repetition
    from diffkd.runs.record_file import RecordFile
    from diffkd.runs.reports import tables

    options = evaluate_options.Options(
        metrics, steps, samples, features, weights, feature_resize, dtype, resize, split, classes, sampler,
        guidance, guidance_interval, guidance_rescale, worse, null_label, quantize, prompts, variant,
        scheduler, teacher, teacher_steps, teacher_guidance,
        bootstrap, kid_subsets, kid_subset_size, is_splits, dino_weights, clip_weights,
        clip_score_weights, protocol, seed, batch_size,
        allow_mismatch, cache_of(cache, cache_folder),
    )  # fmt: skip
    reference = one_reference(against, reference)
    if repeat is not None:
        also = {"the target": target, "the reference": reference, "--out": out, "--json": json or None}
        more = [name for name, value in also.items() if value is not None]
        more += [
            evaluate_options.option(name) for name in options.given() if name not in ("features", "cache")
        ]
        if more:
            raise UserError(f"--repeat takes all from the record; leave out {more[0]}")
        same = repetition.repeat(repeat, Console(), device=device, features_name=features)
        return 0 if same else 1
    if target is None:
        raise UserError("say what to measure and against what: diffkd evaluate TARGET --reference REFERENCE")
    console = Console(stderr=True, quiet=True) if json else Console()
    file = RecordFile(out)
    with no_warnings() if json else nullcontext():
        records = job.measure(target, reference, options, console, device=device, file=file)
    tables.show_evaluation(records, target, console, as_json=json, out=None if file.failure else out)
    file.check()
    return 0


@contextmanager
def no_warnings() -> Iterator[None]:
    """Where records are printed and nothing else: their notes say what one must know. Errors are told."""
    logger = logging.getLogger("diffkd")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def one_reference(argument: str | None, option: str | None) -> str | None:
    """The reference, named in one of two ways."""
    from diffkd.errors import UserError

    if argument is not None and option is not None:
        raise UserError(f"the reference is {argument}, or --reference {option}; leave out one of the two")
    return option if argument is None else argument
