"""The command line: which commands there are, and what was asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any

import typer

from diffkd import __version__
from diffkd.cli import (
    benchmark,
    cache,
    compare,
    distill,
    evaluate,
    export,
    features,
    fid,
    fuse,
    methods,
    push,
    sample,
    stats,
    train,
)
from diffkd.errors import UserError

app = typer.Typer(
    name="diffkd",
    help="Distils diffusion models: many denoising steps into few, as stock diffusers pipelines.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
EXAMPLES: dict[Callable[..., int | None], str] = {
    train.train: "diffkd train configs/digits/teacher.yaml",
    distill.distill: "diffkd distill configs/digits/quickstart.yaml",
    cache.cache: "diffkd cache configs/sd15/progressive.yaml",
    sample.sample: "diffkd sample runs/quickstart/students/4-steps-dmd2 --out images",
    evaluate.evaluate: "diffkd evaluate images --reference digits",
    fid.fid: "diffkd fid images digits",
    compare.compare: "diffkd compare one.json two.json",
    stats.stats: "diffkd stats digits --out digits.npz",
    features.features: "diffkd features train images --out net.safetensors",
    fuse.fuse: "diffkd fuse runs/sd15-lora/students/4-steps --out sd15-4-steps",
    export.export: "diffkd export runs/sd15-lora/students/4-steps --to single-file",
    push.push: "diffkd push runs/quickstart/students/4-steps-dmd2 owner/name",
    benchmark.benchmark: "diffkd benchmark configs/digits/benchmark.yaml",
    methods.methods: "diffkd methods progressive",
}


def _deferred(command: Callable[..., int | None]) -> Callable[..., Callable[[], int | None]]:
    """Gives the command with its arguments instead of running it. What runs inside typer is not ours to end:
    an EOFError becomes an abort there, and a broken pipe an exit without a word."""

    @functools.wraps(command)
    def given(**arguments: Any) -> Callable[[], int | None]:
        return functools.partial(command, **arguments)

    return given


for command, example in EXAMPLES.items():
    app.command(epilog=f"Example: {example}")(_deferred(command))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"diffkd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


def parse() -> Callable[[], int | None]:
    """What the command line asks for, to be called. Raises UserError for what it gets wrong."""
    try:
        asked = app(prog_name="diffkd", standalone_mode=False)  # and not "python -m diffkd.cli"
    except SystemExit as stop:  # completion, which typer ends itself
        asked = stop.code
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # the help was shown
            return lambda: 2
        if hasattr(error, "format_message"):
            raise UserError(f"{error.format_message()} (see diffkd --help)") from error
        raise
    return asked if callable(asked) else lambda: asked if isinstance(asked, int) else 0
