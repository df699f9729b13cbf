"""`diffkd distill`."""

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


def distill(
    config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False, allow: Allow = False,
    stop_after: StopAfter = None,
) -> None:  # fmt: skip
    """Distil a diffusion model into students of fewer steps, or a classifier into smaller ones.

    The config's method says which. The same command resumes it.
    """
    from rich.console import Console

    prepare_libraries()
    from diffkd.runs.classification.distill import distill as distill_classifier
    from diffkd.runs.config import Distill
    from diffkd.runs.config_files import load_distill
    from diffkd.runs.distill import distill as distill_denoiser

    options = resume_options(allow, stop_after)
    settings = load_distill(config, overrides or ())
    if isinstance(settings, Distill):
        run_or_print(settings, dry_run, partial(distill_denoiser, settings, Console(), options))
    else:
        run_or_print(settings, dry_run, partial(distill_classifier, settings, Console(), options))
