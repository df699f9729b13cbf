"""`diffkd cache`."""

from __future__ import annotations

from functools import partial

from diffkd.cli.options import ConfigFile, DryRun, Overrides, prepare_libraries, run_or_print
from diffkd.errors import UserError


def cache(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Compute latents and embeddings of a distillation's data beforehand; the run itself does what is left.

    The same command resumes it. Under a launcher the processes share the work.
    """
    from rich.console import Console

    prepare_libraries()
    from diffkd.runs.config import Distill
    from diffkd.runs.config_files import load_distill
    from diffkd.runs.latents import fill_alone

    settings = load_distill(config, overrides or ())
    if not isinstance(settings, Distill):
        raise UserError(
            f"{config} distils a classifier, of which nothing is computed beforehand; run diffkd distill"
        )
    run_or_print(settings, dry_run, partial(fill_alone, settings, Console()))
