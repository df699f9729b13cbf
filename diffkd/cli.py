"""The `diffkd` command.

Exit status: 0 done, 2 a user's error (one line), 130 interrupted with a checkpoint saved.
"""

from __future__ import annotations

import logging
import sys
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

ConfigFile = Annotated[Path, typer.Argument(help="The run's YAML file, see configs/.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Values to override, as key.sub=value.", show_default=False)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and stop.")]


@app.command()
def train(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train a teacher from images. The same command goes on where it stopped."""
    _job("train", config, overrides, dry_run)


@app.command()
def distill(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Distil a teacher into students of fewer steps. The same command goes on where it stopped."""
    _job("distill", config, overrides, dry_run)


def _job(name: str, path: Path, overrides: list[str] | None, dry_run: bool) -> None:
    import yaml
    from rich.console import Console

    from diffkd import config, jobs

    _quiet_libraries()
    if name == "train":
        teaching = config.load(path, config.Train, overrides or ())
        shown, work = config.resolved(teaching), lambda: jobs.train(teaching, Console())
    else:
        distilling = config.load(path, config.Distill, overrides or ())
        shown, work = config.resolved(distilling), lambda: jobs.distill(distilling, Console())
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
        str, typer.Option(help="Labels in turn: balanced, or a list such as 0-9 or 3,5,7.")
    ] = "balanced",
    seed: Annotated[int, typer.Option(min=0, help="Image i starts from the noise of seed + i.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: the student's own.")] = None,
    sampler: Annotated[str, typer.Option(help="ddim, heun, dpmpp_2m or ancestral.")] = "ddim",
    eta: Annotated[float | None, typer.Option(min=0, max=1, help="Noise of the ancestral sampler.")] = None,
    guidance: Annotated[
        float, typer.Option("-w", "--guidance", min=0, help="Guidance weight; 1 is none.")
    ] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
) -> None:
    """Draw images from a student: a folder of PNGs or an .npz, and a grid of the first 64."""
    from diffkd import sampling

    _quiet_libraries()
    options = {
        key: value for key, value in (("eta", eta), ("guidance", guidance)) if value not in (None, 1.0)
    }
    sampling.sample_to(
        model, out, n=n, classes=classes, seed=seed, steps=steps, sampler=sampler, batch_size=batch_size,
        device=device, overwrite=overwrite, options=options,
    )  # fmt: skip


@app.command()
def methods() -> None:
    """List the distillation methods: their papers and their config."""
    from diffkd import method

    for name in method.names():
        kind = method.find(name)
        print(f"{name}: {(kind.__doc__ or '').strip().splitlines()[0]}\n  {kind.reference}")
        for key, field in kind.model_fields.items():
            print(f"  {key}: {field.get_default(call_default_factory=True)!r}  {field.description or ''}")


def _quiet_libraries() -> None:
    """Warnings of ours to stderr, one line each; libraries speak up only for errors."""
    import diffusers

    logging.basicConfig(format="diffkd: %(message)s", stream=sys.stderr, level=logging.WARNING, force=True)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


def main() -> None:
    """Entry point: a user's error is one line on stderr and exit status 2."""
    from diffkd.base import UserError

    try:
        status = app(standalone_mode=False)
    except UserError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        if type(error).__name__ == "Interrupted":  # of the engine, which is not imported for --help
            print("diffkd: interrupted; a checkpoint is saved, the same command goes on", file=sys.stderr)
            sys.exit(130)
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.exit(2)  # the help was shown
        if hasattr(error, "format_message"):  # click's usage errors
            _fail(f"{error.format_message()} (see diffkd --help)")
        raise
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str) -> None:
    print(f"diffkd: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
