"""`diffkd train`."""

from __future__ import annotations

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
    from diffkd.runs.config_files import load
    from diffkd.runs.train import train as train_teacher

    options = resume_options(allow, stop_after)
    settings = load(config, Train, overrides or ())
    run_or_print(settings, dry_run, lambda: train_teacher(settings, Console(), options))
