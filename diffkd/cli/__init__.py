"""The `diffkd` command.

Exit status: 0 done, or stopped by --stop-after; 1 numbers that differ (evaluate --repeat) or do not compare
(compare), a disk that is full, a process of several that is gone; 2 a user's error (one line); 130
interrupted.
"""

from __future__ import annotations

import os
import sys
import time

import typer

from diffkd.cli import benchmark, compare, distill, evaluate, methods, sample, stats, train

app = typer.Typer(
    name="diffkd",
    help="Distils diffusion models: many denoising steps into few, as stock diffusers pipelines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

OTHERS = 5.0  # seconds in which a launcher ends the other processes, once one has failed

for command in (
    train.train, distill.distill, sample.sample, evaluate.evaluate, compare.compare, stats.stats,
    benchmark.benchmark, methods.methods,
):  # fmt: skip
    app.command()(command)


def main() -> None:
    """Entry point: a user's error is one line on stderr and exit status 2."""
    from diffkd.errors import Interrupted, Unfinished, UserError, one_line

    try:
        status = app(standalone_mode=False)
    except UserError as error:
        _fail(str(error))
    except Unfinished as error:
        _fail(str(error), 1)
    except Interrupted as stop:
        if not _rank():
            why = "stopped, as the time is up" if stop.due else "interrupted"
            saved = "a checkpoint is saved, " if stop.saved else ""
            print(f"diffkd: {why}; {saved}the same command resumes it", file=sys.stderr)
        sys.exit(0 if stop.due else 130)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.exit(2)  # the help was shown
        if hasattr(error, "format_message"):  # click's usage errors
            _fail(f"{error.format_message()} (see diffkd --help)")
        if _rank() is not None:
            from diffkd.training.launch import is_lost_peer

            if is_lost_peer(error):
                why = one_line(str(error))
                _fail(f"another process of this run is gone; its own error says why ({why})", 1)
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
