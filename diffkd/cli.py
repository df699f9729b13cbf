"""The `diffkd` command.

Exit status: 0 done, or stopped by --stop-after; 1 numbers that differ (evaluate --repeat) or do not compare
(compare), a disk that is full, a process of several that is gone; 2 a user's error (one line); 130
interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="diffkd",
    help="Distils diffusion models: many denoising steps into few, as stock diffusers pipelines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

OTHERS = 5.0  # seconds in which a launcher ends the other processes, once one has failed
ConfigFile = Annotated[Path, typer.Argument(help="The run's YAML file, see configs/.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Values to override, as key.sub=value.", show_default=False)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and stop.")]
Allow = Annotated[
    bool,
    typer.Option("--allow", help="Go on with a config that differs in logging, evaluation or checkpoints."),
]
Quantized = Annotated[
    str | None, typer.Option(help="int8: the model's weights in 8 bits, by torchao (extra quant).")
]
StopAfter = Annotated[
    str | None,
    typer.Option(help="Save and stop, exit status 0, after such as 50m; the same command goes on."),
]


@app.command()
def train(
    config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False, allow: Allow = False,
    stop_after: StopAfter = None,
) -> None:  # fmt: skip
    """Train a teacher from images. The same command goes on where it stopped."""
    _job("train", config, overrides, dry_run, allow, stop_after)


@app.command()
def distill(
    config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False, allow: Allow = False,
    stop_after: StopAfter = None,
) -> None:  # fmt: skip
    """Distil a diffusion model into students of fewer steps, or a classifier into smaller ones.

    The config's method says which. The same command goes on where it stopped.
    """
    _job("distill", config, overrides, dry_run, allow, stop_after)


def _job(
    name: str, path: Path, overrides: list[str] | None, dry_run: bool, allow: bool = False,
    stop_after: str | None = None,
) -> None:  # fmt: skip
    import yaml
    from rich.console import Console

    _prepare_libraries()
    from diffkd import config, holding, jobs

    until = None if stop_after is None else time.time() + holding.duration(stop_after)
    terms = holding.Terms(allow, until)
    work: Callable[[], object]
    if name == "benchmark":
        from diffkd import benchmarking

        measuring = config.load(path, config.Benchmark, overrides or ())
        shown, work = config.resolved(measuring), lambda: benchmarking.run(measuring, Console())
    elif name == "train":
        teaching = config.load(path, config.Train, overrides or ())
        shown, work = config.resolved(teaching), lambda: jobs.train(teaching, Console(), terms)
    else:
        from diffkd import classifying, config_classify

        distilling = config_classify.load(path, overrides or ())
        shown = config.resolved(distilling)
        if isinstance(distilling, config.Distill):
            work = partial(jobs.distill, distilling, Console(), terms)
        else:
            work = partial(classifying.distill, distilling, Console(), terms)
    if dry_run:
        print(yaml.safe_dump(shown, sort_keys=False), end="")
    else:
        work()


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="A student, or any supported pipeline: folder or hub id.")],
    out: Annotated[
        Path, typer.Option("--out", help="A folder of PNGs, or one .npz file (arr_0, uint8, NHWC).")
    ],
    n: Annotated[int, typer.Option("-n", min=1, help="How many images.")] = 64,
    classes: Annotated[
        str, typer.Option(help="Labels: balanced, data (as often as there), or in turn, as 0-9 or 3,5,7.")
    ] = "balanced",
    seed: Annotated[int, typer.Option(min=0, help="Image i starts from the noise of seed + i.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: the student's own.")] = None,
    sampler: Annotated[str, typer.Option(help="ddim, heun, dpmpp_2m or ancestral.")] = "ddim",
    eta: Annotated[float | None, typer.Option(min=0, max=1, help="Noise of the ancestral sampler.")] = None,
    guidance: Annotated[
        float, typer.Option("-w", "--guidance", min=0, help="Guidance weight; 1 is none.")
    ] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; default bfloat16 on CUDA, float32 elsewhere."),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="auto, eager, graph (a CUDA graph of all steps) or compile.")
    ] = "auto",
    image_format: Annotated[
        str | None,
        typer.Option("--format", help="Of a folder's files: png (default) or webp, both lossless."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, max=64, help="Processes that encode images; default up to 8 with a GPU, else 0."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda, cuda:1, cpu or mps; default cuda where there is one.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace other images at --out.")] = False,
    quantize: Quantized = None,
) -> None:
    """Draw images from a student: a folder of image files or an .npz, and a grid of the first 64.

    The same command goes on where it stopped.
    """
    from rich.console import Console

    _prepare_libraries()
    from diffkd import sampling

    options = {
        key: value for key, value in (("eta", eta), ("guidance", guidance)) if value not in (None, 1.0)
    }
    sampling.sample_to(
        model, out, Console(), n=n, classes=classes, seed=seed, steps=steps, sampler=sampler,
        batch_size=batch_size, dtype=dtype, mode=mode, image_format=image_format, workers=workers,
        device=device, overwrite=overwrite, quantize=quantize, options=options,
    )  # fmt: skip


Features = Annotated[
    str | None,
    typer.Option(
        help="inception, digits, dinov2, clip or an nn.Module's dotted path; default as the reference."
    ),
]
Weights = Annotated[str | None, typer.Option(help="File or folder of the feature network's weights.")]
FeatureResize = Annotated[
    str | None, typer.Option(help="How inception resizes: tf1 (default), bilinear, antialias or clean.")
]
Dtype = Annotated[str | None, typer.Option(help="Of inception: float32 (default) or float64.")]
ImageSize = Annotated[
    int | None, typer.Option("--resize", min=1, help="Bring images of folders and data sets to this size.")
]
Split = Annotated[str, typer.Option(help="Of a Hugging Face data set.")]
Device = Annotated[str | None, typer.Option(help="Default: cuda where there is one.")]


# Options of `diffkd evaluate` that mean something for a model only, or with a metric: it refuses them else.
OF_MODELS = ("steps", "classes", "sampler", "guidance", "null_label", "quantize", "seed", "teacher",
             "teacher_steps", "teacher_guidance")  # fmt: skip
OF_METRICS = {
    "teacher": "agreement", "teacher_steps": "agreement", "teacher_guidance": "agreement",
    "bootstrap": "fid", "dino_weights": "fd_dino", "clip_weights": "cmmd",
}  # fmt: skip
OF_REPEAT = ("repeat", "device", "features")


@app.command()
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

    _prepare_libraries()
    from diffkd import evaluating, subjects
    from diffkd.base import UserError

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
        if name in OF_MODELS and not subjects.is_model(target) and subjects.is_there(target):
            raise UserError(f"{_option(name)} is for models, and {target} is a set of images; leave it out")
        if name in OF_METRICS and OF_METRICS[name] not in asked:
            raise UserError(f"{_option(name)} is for the metric {OF_METRICS[name]}; add it to --metrics")
    compared = evaluating.reference_of(reference, resize=resize, split=split)
    subject = subjects.Subject(
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


@app.command()
def compare(
    one: Annotated[Path, typer.Argument(help="A file of `diffkd evaluate --out`.", show_default=False)],
    two: Annotated[Path, typer.Argument(help="Another.", show_default=False)],
) -> int:
    """Two records side by side; where their protocols differ, what differs (exit status 1)."""
    from rich.console import Console

    from diffkd import tables

    return 0 if tables.compare(one, two, Console()) else 1


@app.command()
def stats(
    images: Annotated[str, typer.Argument(help="digits, a folder of images, an image .npz, or a data set.")],
    out: Annotated[Path, typer.Option("--out", help="The .npz to write: mu, sigma, and their protocol.")],
    features: Features = None,
    weights: Weights = None,
    feature_resize: FeatureResize = None,
    dtype: Dtype = None,
    resize: ImageSize = None,
    split: Split = "train",
    store_features: Annotated[
        bool, typer.Option("--store-features", help="Keep every feature, for kid, prdc and cmmd.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
) -> None:
    """Compute reference statistics of images once, in the format that other FID tools read."""
    from rich.console import Console

    _prepare_libraries()
    from diffkd import stats as statistics

    statistics.stats(
        images, out, Console(), features_name=features, weights=weights, feature_resize=feature_resize,
        dtype=dtype, resize=resize, split=split, store=store_features, batch_size=batch_size, device=device,
        overwrite=overwrite,
    )  # fmt: skip


@app.command()
def benchmark(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Measure models x steps x metrics into one table. The same command goes on where it stopped."""
    _job("benchmark", config, overrides, dry_run)


@app.command()
def methods() -> None:
    """List the distillation methods: their papers and their config."""
    from diffkd import method

    for name in method.names():
        kind = method.find(name)
        print(f"{name}: {(kind.__doc__ or '').strip().splitlines()[0]}\n  {kind.reference}")
        for key, field in kind.model_fields.items():
            print(f"  {key}: {field.get_default(call_default_factory=True)!r}  {field.description or ''}")


def _prepare_libraries() -> None:
    """Warnings of ours to stderr, one line each; libraries speak up only for errors. And no more threads than
    cores: two on one core wait for each other."""
    for talkative in ("torchao", "torch.utils._pytree"):  # of what they lack, as soon as they are imported
        logging.getLogger(talkative).setLevel(logging.ERROR)
    import diffusers
    import psutil
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), psutil.cpu_count(logical=False) or 1))

    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")  # diffusers' own
    logging.basicConfig(format="diffkd: %(message)s", stream=sys.stderr, level=logging.WARNING, force=True)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


def main() -> None:
    """Entry point: a user's error is one line on stderr and exit status 2."""
    from diffkd.base import Interrupted, Unfinished, UserError
    from diffkd.text import line

    try:
        status = app(standalone_mode=False)
    except UserError as error:
        _fail(str(error))
    except Unfinished as error:
        _fail(str(error), 1)
    except Interrupted as stop:
        if not _rank():
            why = "stopped, as the time is over" if stop.due else "interrupted"
            saved = "a checkpoint is saved, " if stop.saved else ""
            print(f"diffkd: {why}; {saved}the same command goes on", file=sys.stderr)
        sys.exit(0 if stop.due else 130)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.exit(2)  # the help was shown
        if hasattr(error, "format_message"):  # click's usage errors
            _fail(f"{error.format_message()} (see diffkd --help)")
        if _rank() is not None:
            from diffkd.launching import lost_another

            if lost_another(error):
                _fail(f"another process of this run is gone; its own error says why ({line(str(error))})", 1)
        raise
    sys.exit(status if isinstance(status, int) else 0)


def _rank() -> int | None:
    """Of this process among those of a launcher; None where there is none."""
    return int(os.environ["RANK"]) if os.environ.get("RANK", "").isdigit() else None


def _fail(message: str, status: int = 2) -> None:
    if _rank():
        time.sleep(OTHERS)  # what all processes find, the first one says, and the launcher ends the others
    print(f"diffkd: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
