"""Attacks every command with odd input, and says how often each ended as it should.

    python scripts/attack.py                        # all kinds, about 20 minutes on two free cores
    python scripts/attack.py --kinds names disks --count 40
    python scripts/attack.py --only names:17        # one again, with all that it printed

The input is made afresh from --seed. An attack is right if the command ended with exit status 0, or with 1 or
2 and one line that begins with "diffkd: error:"; without a traceback (exit status 70), a hang, files changed
outside of the folder it was started in, files left behind, or 4 GB of memory; and if nothing was unpickled.
The exit status is 1 if any attack found a fault.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from attacks import judge, run, scene
from attacks.base import Attack, Place

COUNTS = {
    "pipelines": 1700,
    "run_files": 160,
    "names": 400,
    "disks": 40,
    "configs": 300,
    "data": 300,
    "surroundings": 150,
}
IMPORTED = (  # what diffkd.cli imports when it needs it, and what is slow to import
    "diffkd.cli", "diffkd.runs.benchmark", "diffkd.runs.classification.distill", "diffkd.runs.distill",
    "diffkd.runs.train",
    "diffkd.runs.evaluate", "diffkd.runs.repeat", "diffkd.runs.stats", "diffkd.generation.sample",
    "matplotlib.pyplot",
    "sklearn.datasets", "datasets", "transformers", "diffusers.pipelines.ddpm", "diffusers.pipelines.ddim",
    "diffusers.pipelines.consistency_models", "encodings.cp437", "encodings.idna",
)  # fmt: skip


def attempt(job: tuple[str, int], seed: int, base: Path) -> dict[str, Any]:
    """One attack: made, run, judged. Its folder stays."""
    kind, number = job
    result: dict[str, Any] = {"kind": kind, "number": number}
    place = Place(base / f"{kind}-{number}")
    began = time.monotonic()
    made = None
    try:
        rng = random.Random(f"{seed}/{kind}/{number}")
        made = importlib.import_module(f"attacks.{kind}").attack(rng, number, place, base / "scene")
        result |= {"what": made.what, "command": " ".join(map(ascii, made.arguments))}
        found, ended = outcome(made, place, base)
        result |= {"status": ended.status, "cpu": ended.cpu, "faults": found}
        result |= {"stdout": ended.stdout[-2000:], "stderr": ended.stderr[-4000:]}
    except Exception:
        result |= {"status": None, "cpu": 0.0, "faults": [f"not made: {traceback.format_exc()}"]}
    finally:
        if made is not None and made.end is not None:
            made.end()
    return result | {"seconds": time.monotonic() - began}


def outcome(made: Attack, place: Place, base: Path) -> tuple[list[str], run.Ended]:
    """What is wrong with what the command did, and how it ended, the last time where it is repeated."""
    options: dict[str, Any] = {
        "folder": place.here, "environment": made.environment, "encoding": made.encoding,
        "writable": [str(base / "cache")],
    }  # fmt: skip
    command = partial(run.diffkd, made.arguments)
    before = run.tree(place.root)
    streams = {"stdout": made.stdout, "stderr": made.stderr}
    ended = run.forked(command, place.root, inside=made.inside, **options, **streams)
    found = judge.faults(made, ended, before, run.tree(place.root), place.root)
    if made.again is None or found or ended.status == 0:
        return found, ended
    made.again()
    ended = run.forked(command, place.root, **options)
    if ended.status not in (0, 1 if made.silent else 0):
        found = judge.faults(made, ended, before, run.tree(place.root), place.root)
        found = [f"again: {fault}" for fault in found or [f"exit status {ended.status}"]]
    return found, ended


def prepare(base: Path) -> None:
    """Everything imported and the scene built, so that attacks only fork."""
    os.environ |= {
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(base / "cache/hf"),
        "HF_HUB_OFFLINE": "1",
        "MPLCONFIGDIR": str(base / "cache/matplotlib"),
    }  # fmt: skip
    for name in (*IMPORTED, *(f"attacks.{kind}" for kind in COUNTS)):
        try:
            importlib.import_module(name)
        except ImportError:
            print(f"not here: {name}")
    import torch

    torch.set_num_threads(1)

    def checked(work: Any, inside: Any = None, status: int = 0) -> None:
        for name in ("home", "tmp"):
            (base / name).mkdir(exist_ok=True)
        ended = run.forked(work, base, folder=base / "scene", inside=inside)
        if ended.status != status:
            raise SystemExit(f"the scene could not be built ({ended.status}): {ended.stdout} {ended.stderr}")

    scene.build(
        base / "scene",
        lambda function, *arguments: checked(partial(function, *arguments)),
        lambda *arguments, **options: checked(partial(run.diffkd, arguments), **options),
    )


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=COUNTS, default=list(COUNTS))
    parser.add_argument("--count", type=int, help="attacks of each kind; default " + str(COUNTS))
    parser.add_argument("--first", type=int, default=0, help="number of the first attack of each kind")
    parser.add_argument("--only", help="kind:number, one attack, with what it printed; its folder is kept")
    parser.add_argument("--jobs", type=int, default=2, help="at a time")
    parser.add_argument("--log", type=Path, help="a file of JSON lines, one for each attack")
    options = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="attack-")).resolve()
    base.chmod(0o755)  # some attacks are another user's
    began = time.monotonic()
    try:
        prepare(base)
        print(f"seed {options.seed}; prepared in {time.monotonic() - began:.0f} s", flush=True)
        return again(options, base) if options.only else report(options, base)
    finally:
        if not options.only:
            shutil.rmtree(base, ignore_errors=True)


def again(options: argparse.Namespace, base: Path) -> int:
    """One attack with all that it printed; its folder stays."""
    kind, _, number = options.only.partition(":")
    result = attempt((kind, int(number)), options.seed, base)
    for key in ("what", "command", "status", "cpu", "seconds", "faults", "stdout", "stderr"):
        print(f"{key}: {result.get(key)}")
    print(f"its folder: {base}/{kind}-{number}")
    return int(bool(result["faults"]))


def side_by_side(
    jobs: list[tuple[str, int]], work: Callable[..., dict[str, Any]], at_once: int, base: Path
) -> Iterator[dict[str, Any]]:
    """The results of work(job), each in a process of its own, so many at once, as they end."""
    running: dict[int, Path] = {}
    waiting = iter(jobs)
    while True:
        while len(running) < at_once and (job := next(waiting, None)) is not None:
            answer = base / f"{job[0]}-{job[1]}.json"
            child = os.fork()
            if child == 0:
                try:
                    answer.write_text(json.dumps(work(job)))
                finally:
                    shutil.rmtree(answer.with_suffix(""), ignore_errors=True)
                    os._exit(0)
            running[child] = answer
        if not running:
            return
        child, _ = os.wait()
        if answer := running.pop(child, None):
            yield json.loads(answer.read_text())
            answer.unlink()


def report(options: argparse.Namespace, base: Path) -> int:
    """Runs the attacks, prints each fault as it is found, and counts at the end."""
    jobs = [
        (kind, number)
        for kind in options.kinds
        for number in range(options.first, options.first + (options.count or COUNTS[kind]))
    ]
    outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
    causes: collections.Counter[str] = collections.Counter()
    log = options.log.open("a") if options.log else None
    names = {0: "done", 1: "stopped or differs", 2: "refused"}
    for result in side_by_side(jobs, partial(attempt, seed=options.seed, base=base), options.jobs, base):
        kind = result["kind"]
        outcome = "FAULT" if result["faults"] else names.get(result["status"], str(result["status"]))
        outcomes[kind, outcome] += 1
        if log is not None:
            print(json.dumps(result), file=log, flush=True)
        for fault in result["faults"]:
            causes[fault] += 1
            if causes[fault] == 1:
                print(f"{kind}:{result['number']}  {fault}\n    diffkd {result.get('command')}\n"
                      f"    {result.get('what')}", flush=True)  # fmt: skip
    print(f"\nseed {options.seed}")
    for kind in options.kinds:
        counts = {outcome: n for (k, outcome), n in sorted(outcomes.items()) if k == kind}
        print(f"{kind}: {sum(counts.values())} attacks: " + ", ".join(f"{n} {o}" for o, n in counts.items()))
    for fault, count in causes.most_common():
        print(f"{count:5} x {fault}")
    return int(any(outcome == "FAULT" for _, outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
