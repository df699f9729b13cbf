"""Options that several subcommands share, and how a config becomes a run."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffkd.cli.completion import FEATURES, RESIZES, TOOLS, among, override
from diffkd.cli.endings import rank

if TYPE_CHECKING:
    from diffkd.runs.session import ResumeOptions


ConfigFile = Annotated[Path, typer.Argument(help="The run's YAML file, see configs/.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Values to override, as key.sub=value.", show_default=False, autocompletion=override),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and stop.")]
Allow = Annotated[
    bool,
    typer.Option("--allow", help="Resume with a config that differs in logging, evaluation or checkpoints."),
]
Quantized = Annotated[
    str | None, typer.Option(help="int8: the model's weights in 8 bits, by torchao (extra quant).")
]
Variant = Annotated[
    str | None,
    typer.Option(help="Of the weights, such as fp16 or non_ema; default the plain ones, or the only ones."),
]
NoiseScheduler = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        help="In place of the model's own, or of a network that has none: a scheduler_config.json, a folder "
        "that has one, or a class such as DDPMScheduler.",
    ),
]
GuidanceInterval = Annotated[
    tuple[float, float] | None,
    typer.Option(
        help="Of a guided teacher: the least and largest noise level, sigma / alpha, at which it is guided.",
    ),
]
GuidanceRescale = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, help="Of a guided teacher: how far its output keeps the deviation of the unguided one."
    ),
]
Worse = Annotated[
    str | None,
    typer.Option(help="Of a guided teacher: a worse model that guidance leads away from (autoguidance)."),
]
StopAfter = Annotated[
    str | None,
    typer.Option(help="Save and stop, exit status 0, after such as 50m; the same command resumes it."),
]

Features = Annotated[
    str | None,
    typer.Option(
        help="inception, digits, shapes, dinov2, clip, a .safetensors of diffkd features train, or your own: "
        "module, module.Class or file; default as the reference.",
        autocompletion=among(*FEATURES),
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="Of the feature network: a file for inception, the published one or a .safetensors of your own "
        "with the same names; a folder for dinov2 and clip."
    ),
]
Cache = Annotated[
    bool,
    typer.Option(
        " /--no-cache", help="Neither use nor keep features of the reference in the user's cache folder."
    ),
]
CacheFolder = Annotated[
    str | None,
    typer.Option(
        "--cache",
        help="Keep the features of the images of both sets (not of those that a model draws) in this folder, "
        "and take them from it.",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="The very number of a tool: pytorch-fid, clean-fid, torch-fidelity, edm, or adm (how files are "
        "decoded and resized, values, and the arithmetic of the distance).",
        autocompletion=among(*TOOLS),
    ),
]
FeatureResize = Annotated[
    str | None,
    typer.Option(
        help="How inception takes images in: tf1 (default), clean, pytorch-fid or torchmetrics.",
        autocompletion=among(*RESIZES),
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Of inception: float32 (default) or float64.", autocompletion=among("float32", "float64")
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option("--resize", min=1, max=16_384, help="Bring images of folders and data sets to this size."),
]
Split = Annotated[str | None, typer.Option(help="Of a Hugging Face data set; default train.")]
Device = Annotated[str | None, typer.Option(help="Default: cuda where there is one.")]


def cache_of(cache: bool, folder: str | None) -> bool | str:
    """What --cache and --no-cache say together. Raises UserError for both."""
    from diffkd.errors import UserError

    if folder is not None and not cache:
        raise UserError(f"--cache {folder} and --no-cache are at odds; leave out one of the two")
    return cache if folder is None else folder


def duration(text: str) -> float:
    """Seconds: 90s, 50m, 1h30m, 2d. Raises UserError for anything else."""
    from diffkd.errors import UserError

    units = (rf"(?:(\d{{1,9}}){unit})?" for unit in "dhms")  # no more digits: a thousand years in each unit
    parts = re.fullmatch("".join(units), text, re.ASCII)
    if parts is None or not any(parts.groups()):
        raise UserError(f"--stop-after {text!r} is not a time; give one such as 50m, 1h30m or 90s")
    days, hours, minutes, seconds = (int(part or 0) for part in parts.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def resume_options(allow: bool, stop_after: str | None) -> ResumeOptions:
    from diffkd.runs.session import ResumeOptions

    return ResumeOptions(allow, None if stop_after is None else time.monotonic() + duration(stop_after))


def run_or_print(settings: Any, dry_run: bool, run: Callable[[], object]) -> None:
    """Runs it, or prints its config with every default written out. Raises UserError, before any work, where
    the run's folder cannot be written."""
    import yaml

    from diffkd.io.places import check_writable
    from diffkd.runs.config_files import resolved

    if dry_run:
        print(yaml.safe_dump(resolved(settings), sort_keys=False), end="")
        return
    if not rank():
        check_writable(settings.out, "out", folder=True)
    run()


def prepare_libraries() -> None:
    """Our own warnings go to stderr, one line each; libraries only report errors. And no more threads than
    cores: two on one core wait for each other. diffusers is imported later, by what opens a model."""
    for name in (
        "torchao",
        "torch.utils._pytree",
    ):  # which warn of missing parts as soon as they are imported
        logging.getLogger(name).setLevel(logging.ERROR)
    import psutil
    import torch

    from diffkd.io import naming

    naming.speak("command")
    torch.set_num_threads(min(torch.get_num_threads(), psutil.cpu_count(logical=False) or 1))

    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")  # diffusers' own
    # of normalisations whose weights stay float32 in mixed precision, such as Flux's
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
    logging.basicConfig(format="diffkd: %(message)s", stream=sys.stderr, level=logging.WARNING, force=True)
    os.environ["DIFFUSERS_VERBOSITY"] = "error"  # which it reads when it is imported
    for name in ("diffusers", "huggingface_hub"):  # the latter warns of each of its tries
        logging.getLogger(name).setLevel(logging.ERROR)
