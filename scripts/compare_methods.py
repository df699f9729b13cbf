"""Every method at one cost, in one table: what scripts/compare_methods.sh runs, from the repository's root.

    python scripts/compare_methods.py [--data digits] [--seeds 0 1 2] [--methods dmd2 sid] [--minutes 60]
    python scripts/compare_methods.py --trial      # a few updates and images of each, to see that all runs
    python scripts/compare_methods.py --merge a/results.json b/results.json   # seeds that were run elsewhere

The methods and their configs are listed in scripts/comparison/plan.py. Each is trained with each seed into
runs/compare/<method>-<seed>, by one thread, as many side by side as there are cores; then every student is
measured. Runs that are finished and students that were measured are left as they are, so the same command
goes on where it was stopped. Writes results.json, table.md and three pictures there.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from comparison import cost, pictures, plan, table
from comparison.jobs import Job, cores, last_line, side_by_side
from comparison.measures import VALUES, Measures, Model, student, teachers
from comparison.merging import merged

from diffkd.errors import UserError
from diffkd.io.environment import commit
from diffkd.io.files import new_file, write_json
from diffkd.methods.base import Stage


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits", choices=list(plan.COMPARISONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="default all of the list")
    parser.add_argument("--minutes", type=float, help="of training; then what is finished is measured")
    parser.add_argument("--jobs", type=int, default=cores(), help="runs side by side; default the cores")
    parser.add_argument("--out", type=Path, help="default runs/compare, or runs/compare-DATA")
    parser.add_argument("--trial", action="store_true", help="of a few updates; into runs/compare-trial")
    parser.add_argument(
        "--merge",
        nargs="+",
        type=Path,
        metavar="RESULTS",
        help="only this: one table of several results.json",
    )
    parser.add_argument("--measure", metavar="FEATURES", help="only this: measures what is finished")
    given = parser.parse_args(arguments)
    if given.jobs < 1:
        parser.error(f"--jobs {given.jobs} is no number of runs side by side; use 1 or more")
    if len({*given.seeds}) < len(given.seeds) or min(given.seeds) < 0:
        parser.error("--seeds are to differ, and not below 0")
    unknown = [name for name in given.methods or () if name not in plan.COMPARISONS[given.data].methods]
    if unknown:
        known = ", ".join(plan.COMPARISONS[given.data].methods)
        parser.error(f"--methods {unknown[0]} is not in the list; use some of {known}")
    titles = [one.title for one in plan.COMPARISONS[given.data].features]
    if given.measure not in (None, *titles):
        parser.error(f"--measure {given.measure} is not in the list; use one of {', '.join(titles)}")
    suffix = "" if given.data == "digits" else f"-{given.data}"
    given.out = given.out or Path(f"runs/compare{suffix}{'-trial' * given.trial}")
    return given


def main(arguments: Sequence[str]) -> int:
    given = parsed(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs that were started are ended, and saved
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    if given.merge:
        results = merged([json.loads(path.read_text(encoding="utf-8")) for path in given.merge])
        given.out.mkdir(parents=True, exist_ok=True)
        show(given.out, results)
        return 0
    comparison = plan.COMPARISONS[given.data]
    if given.trial:
        comparison = comparison.tried(given.out)
    given.out.mkdir(parents=True, exist_ok=True)
    runs = comparison.runs(given.methods or comparison.methods, given.seeds, given.out, trial=given.trial)
    if given.measure is None:
        comparison.prepare()
    teacher = plan.opened(comparison)
    plans = {run.method: run.plan(teacher) for run in runs if run.seed == given.seeds[0]}
    students = {method: plan.students_of(found) for method, found in plans.items()}
    if given.measure is not None:
        finished = [run for run in runs if run.finished(students[run.method])]
        features = next(one for one in comparison.features if one.title == given.measure)
        found = [model for run in finished for model in _models(run, students[run.method])]
        measures = Measures(comparison, features, comparison.training.data.load(), _samples(given))
        measures.measure([*teachers(comparison), *found])
        return 0

    left = [run for run in runs if not run.finished(students[run.method])]
    print(f"{len(runs)} runs, {len(runs) - len(left)} of them finished", flush=True)
    until = None if given.minutes is None else time.monotonic() + 60 * given.minutes
    jobs = [Job(run.name, run.command, given.out / f"{run.name}.log") for run in left]
    failed = side_by_side(jobs, given.jobs, until)
    finished = [run for run in runs if run.finished(students[run.method])]
    measuring = [
        Job(
            f"measuring by {one.title} features",
            [sys.executable, __file__, *arguments, "--measure", one.title],
            given.out / f"measuring-{one.title}.log",
        )
        for one in comparison.features
    ]
    failed += side_by_side(measuring, given.jobs)
    for job in failed:
        print(f"{job.name} failed: {last_line(job.log)} ({job.log})", file=sys.stderr)
    if any(job in failed for job in measuring) or not finished:
        print("no table: nothing was measured", file=sys.stderr)
        return 1
    write(given, comparison, finished, plans, students)
    if len(finished) < len(runs):
        print(f"{len(runs) - len(finished)} runs are not finished; the same command goes on with them")
    return 1 if failed else 0


def write(
    given: argparse.Namespace,
    comparison: plan.Comparison,
    finished: Sequence[plan.Run],
    plans: dict[str, Any],
    students: dict[str, list[Stage]],
) -> None:
    """results.json, table.md and the pictures."""
    images, teacher = comparison.training.data.load(), plan.opened(comparison)
    by = {one.title: Measures(comparison, one, images, _samples(given)) for one in comparison.features}
    found: dict[str, list[plan.Run]] = {}
    for run in finished:
        found.setdefault(run.method, []).append(run)
    results: dict[str, Any] = {
        "data": given.data, "features": list(by), "count": next(iter(by.values())).count,
        "seeds": given.seeds, "guidance": comparison.guidance, "commit": commit(),
        "teacher": [_row("teacher", [model], by) for model in teachers(comparison)], "methods": {},
    }  # fmt: skip
    for method, its in found.items():
        counted = cost.passes(plans[method], teacher, images, its[0].config.training)
        rows = [_row(one.name, [_models(run, [one])[0] for run in its], by) for one in students[method]]
        results["methods"][method] = {
            "seeds": [run.seed for run in its],
            "seconds": [cost.seconds_with_pairs(run.folder / "log.jsonl", counted) for run in its],
            "passes": counted.total, "passes_of_an_update": counted.update, "students": rows,
        }  # fmt: skip
    folders = {method: its[0].folder for method, its in found.items()}
    draws = pictures.draws(given.out / "draws.png", results, comparison.teacher, folders)
    show(given.out, results, *["draws.png"] * draws)


def show(out: Path, results: dict[str, Any], *more: str) -> None:
    """results.json, table.md and the pictures that are made of them."""
    write_json(out / "results.json", results)
    with new_file(out / "table.md") as temporary:
        temporary.write_text(table.markdown_of(results), encoding="utf-8")
    features = results["features"][0]
    drawn = {
        "fid-steps.png": pictures.fid_against_steps(out / "fid-steps.png", results, features),
        "fid-seconds.png": pictures.fid_against_seconds(out / "fid-seconds.png", results, features),
    }
    print((out / "table.md").read_text(encoding="utf-8"))
    names = ", ".join([*(name for name, there in drawn.items() if there), *more])
    print(f"{out}: results.json, table.md" + (f", {names}" if names else "; pictures need matplotlib"))


def _samples(given: argparse.Namespace) -> int | None:
    return plan.TRIAL_IMAGES if given.trial else None


def _models(run: plan.Run, students: Sequence[Stage]) -> list[Model]:
    return [student(run, one.name, one.steps or 0, one.drawn) for one in students]


def _row(name: str, models: Sequence[Model], by: dict[str, Measures]) -> dict[str, Any]:
    """models: the same one of every seed."""
    of: dict[str, dict[str, list[float | None]]] = {}
    for features, measures in by.items():
        records = [measures.find(model) for model in models]
        assert all(record is not None for record in records)
        of[features] = {
            key: [record[key] for record in records if record is not None]
            for key in VALUES if all(record is not None and key in record for record in records)
        }  # fmt: skip
    return {"model": name, "steps": models[0].steps, "guidance": models[0].guidance, "of": of}


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # which said why
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
