"""`diffkd distill`."""

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


def distill(
    config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False, allow: Allow = False,
    stop_after: StopAfter = None,
) -> None:  # fmt: skip
    """Distil a diffusion model into students of fewer steps, or a classifier into smaller ones.

    The config's method says which. The same command goes on where it stopped.
    """
    from rich.console import Console

    prepare_libraries()
    from diffkd.runs import distill as job
    from diffkd.runs.classification import config as classification
    from diffkd.runs.classification import distill as classifier_job

    options = resume_options(allow, stop_after)
    settings = classification.load(config, overrides or ())
    if isinstance(settings, classification.Classify):
        classifiers = settings
        run_or_print(settings, dry_run, lambda: classifier_job.distill(classifiers, Console(), options))
    else:
        denoisers = settings
        run_or_print(settings, dry_run, lambda: job.distill(denoisers, Console(), options))
