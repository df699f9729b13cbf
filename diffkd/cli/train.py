"""`diffkd train`."""

from __future__ import annotations

from functools import partial

from diffkd.cli.options import (
    Allow,
    ConfigFile,
    DryRun,
    Overrides,
    StopAfter,
    prepare_libraries,
    resume_options,
    run_or_print,
)


def train(
    config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False, allow: Allow = False,
    stop_after: StopAfter = None,
) -> None:  # fmt: skip
    """Train a teacher from images. The same command resumes it."""
    from rich.console import Console

    prepare_libraries()
    from diffkd.runs.config import Train
    from diffkd.runs.config_files import load_train
    from diffkd.runs.latent_teacher.train import train as train_latent
    from diffkd.runs.train import train as train_teacher

    options = resume_options(allow, stop_after)
    settings = load_train(config, overrides or ())
    if isinstance(settings, Train):
        run_or_print(settings, dry_run, partial(train_teacher, settings, Console(), options))
    else:
        run_or_print(settings, dry_run, partial(train_latent, settings, Console(), options))
