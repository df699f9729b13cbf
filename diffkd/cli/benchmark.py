"""`diffkd benchmark`."""

from __future__ import annotations

from diffkd.cli.options import ConfigFile, DryRun, Overrides, prepare_libraries, run_or_print


def benchmark(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Measure models x steps x metrics into one table. The same command resumes it."""
    from rich.console import Console

    prepare_libraries()
    from diffkd.runs import benchmark as job
    from diffkd.runs.benchmark_config import Benchmark
    from diffkd.runs.config_files import load

    settings = load(config, Benchmark, overrides or ())
    run_or_print(settings, dry_run, lambda: job.run(settings, Console()))
