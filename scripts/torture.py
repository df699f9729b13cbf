"""Kills short distillations on digits at random moments until they finish, and compares what they leave, byte
for byte, with runs that were not killed.

    python scripts/torture.py --kills 40

A third of the runs are of one process, a third of two that hold copies, a third of two that hold shards
(FSDP2) and write a checkpoint together; half are a progressive distillation, half a chain of methods with
pairs, networks that stay or follow, and several that learn. A kill is SIGKILL, now and then SIGTERM, to one
process: after a random time, in an update between the gradient of one of its losses and the step, in an
evaluation or amid pairs between two batches, or at a fault point: just before one of the file operations
(open, rename, remove, ...) in checkpoints/, students/, samples/, pairs/, the teacher's folder, metrics.json
or log.jsonl. The last line sums up; the exit status is 1 if anything differs. With --chain halving ten
minutes on two cores, without it several times that.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from diffkd import cli
from diffkd.runs import config, session
from diffkd.training import update

MEASURED = {  # what depends on the machine, not on the run
    "images_per_second", "cpu_seconds_per_update", "peak_memory_gb", "seconds", "peak_memory_bytes",
    "created", "device", "commit",
}  # fmt: skip
TEACHER = {
    "out": "runs/teacher",
    "data": {"kind": "digits"},
    "model": {"channels": [8, 16], "norm_groups": 4},
    "denoising": {"updates": 10, "learning_rate": 1e-3, "warmup": 0},
    "training": {"batch_size": 16, "micro_batches": 2, "log_every": 4, "checkpoint_every": 3},
    "evaluation": {"samples": 48, "batch_size": 8, "teacher_steps": [4]},
    "pictures": 16,
}
DISTILL = {
    "out": "runs/students",
    "teacher": {"train": "teacher.yaml"},
    "data": {"kind": "digits"},
    "training": TEACHER["training"],
    "evaluation": TEACHER["evaluation"],
    "pictures": 16,
}
CHAINS: dict[str, list[dict[str, Any]]] = {
    "halving": [{"name": "progressive", "steps": [4, 2, 1], "updates": [10, 10, 12], "warmup": 0}],
    "networks": [
        {"name": "regression", "pairs": 48, "pair_steps": 4, "updates": 7},
        {"name": "lcm", "steps": [4, 2], "target_decay": 0.5, "updates": 8},
        {"name": "scm", "steps": [1], "updates": 7},
        {"name": "tcm", "mode": "distillation", "steps": [1], "updates": 7},
        {"name": "shortcut", "steps": [1], "target_decay": 0.5, "updates": 7},
        {"name": "dmd2", "steps": 2, "fake_updates": 2, "gan": 0.1, "updates": 7},
        {"name": "f_distill", "fake_updates": 2, "updates": 7},
        {"name": "sid", "updates": 7},
        {"name": "adversarial", "r1": 1.0, "updates": 7},
    ],
}
SHARDS = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
LAYOUTS: dict[str, tuple[int, dict[str, str]]] = {  # processes, and variables of their environment
    "one": (1, {}), "copies": (2, {}), "shards": (2, SHARDS),
}  # fmt: skip
PLACES = ("checkpoints", "students", "samples", "pairs", "teacher/teacher", "metrics.json", "log.jsonl")
CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


# in the process that is killed ------------------------------------------------------------------------


def child(fault: dict[str, Any], arguments: list[str]) -> None:
    """Runs `diffkd` with a fault injected. fault: kind, signal, rank, and what the kind needs."""

    def strike() -> None:
        Path(fault["struck"]).touch()
        os.kill(os.getpid(), fault["signal"])

    counts: Counter[str] = Counter()

    def count(kind: str, where: str = "") -> None:
        if kind == fault["kind"] and where == fault.get("place", ""):
            counts[kind] += 1
            if counts[kind] == fault["at"]:
                strike()

    if fault.get("rank", 0) != int(os.environ.get("RANK", 0)):
        pass
    elif fault["kind"] == "time":
        check = config.Distill.check

        def begun(*args: Any) -> None:  # not while torch is imported
            threading.Timer(fault["at"], strike).start()
            check(*args)

        config.Distill.check = begun  # type: ignore[method-assign]
    elif fault["kind"] == "disk":

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event in CHANGES and args and isinstance(args[0], (str, os.PathLike)):
                path = os.fspath(args[0])
                if "runs/" in path and not (event == "open" and args[1] == "r"):
                    count("disk", next((place for place in PLACES if f"/{place}" in path), "?"))

        sys.addaudithook(hook)
    elif fault["kind"] == "update":
        agreed = update._agree

        def between(*args: Any) -> Any:
            count("update")
            return agreed(*args)

        update._agree = between
    elif fault["kind"] == "evaluation":
        image_bar = session.Session.image_bar

        @contextmanager
        def counted_bar(self: Any, title: str, total: int) -> Any:
            with image_bar(self, title, total) as on_images:

                def counted(images: int) -> None:
                    count("evaluation")
                    on_images(images)

                yield counted

        session.Session.image_bar = counted_bar  # type: ignore[method-assign]
    sys.argv = ["diffkd", *arguments]
    cli.main()


# the runs ---------------------------------------------------------------------------------------------


def command(processes: int, fault: dict[str, Any]) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*launcher, __file__, "--child", json.dumps(fault), "distill", "distill.yaml"]


def start(folder: Path, layout: str, fault: dict[str, Any]) -> tuple[int, str]:
    """One attempt; its exit status and stderr."""
    processes, variables = LAYOUTS[layout]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    done = subprocess.run(
        command(processes, fault), cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    return done.returncode, done.stderr


def prepare(folder: Path, chain: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "teacher.yaml").write_text(yaml.safe_dump(TEACHER))
    (folder / "distill.yaml").write_text(yaml.safe_dump({**DISTILL, "method": CHAINS[chain]}))
    return folder


def draw(rng: random.Random, layout: str, chain: str) -> dict[str, Any]:
    kind = rng.choice(["time", "disk", "disk", "disk", "update", "evaluation"])
    fault: dict[str, Any] = {
        "kind": kind,
        "signal": int(signal.SIGTERM if rng.random() < 0.15 else signal.SIGKILL),
        "rank": rng.randrange(LAYOUTS[layout][0]),
    }
    if kind == "time":
        return {**fault, "at": rng.uniform(0, 1.5)}
    if kind == "disk":  # only the main process writes, but for checkpoints of shards
        places = [place for place in PLACES if place != "pairs" or chain == "networks"]
        fault["place"], fault["at"] = rng.choice(places), rng.randint(1, 12)
        together = layout == "shards" and fault["place"] == "checkpoints"
        return {**fault, "rank": fault["rank"] if together else 0}
    return {**fault, "at": rng.randint(1, 12)}


# comparison -------------------------------------------------------------------------------------------


def unmeasured(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: unmeasured(inner) for key, inner in value.items() if key not in MEASURED}
    return [unmeasured(inner) for inner in value] if isinstance(value, list) else value


def content(path: Path) -> Any:
    """The bytes of a file; of JSON, its values without MEASURED."""
    if path.suffix == ".jsonl":
        return [unmeasured(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".json":
        return unmeasured(json.loads(path.read_text()))
    return path.read_bytes()


def files(folder: Path) -> dict[str, Path]:
    """What must be the same, leftovers included: all but the report and the description of the machine."""
    return {
        str(path.relative_to(folder)): path
        for path in sorted((folder / "runs").rglob("*"))
        if path.is_file() and path.name not in ("report.html", "environment.json")
    }


def differences(whole: Path, tortured: Path) -> tuple[int, list[str]]:
    """How many files were compared, and which differ. Only checkpoints that both have are compared: a signal
    that saves one more makes another one go."""
    one, two = files(whole), files(tortured)
    for every, other in ((one, two), (two, one)):
        for name in [name for name in every if "/checkpoints/" in name and name not in other]:
            del every[name]
    different = sorted(one.keys() ^ two.keys())
    same = sorted(one.keys() & two.keys())
    if not any("/checkpoints/" in name for name in same):
        different.append("no common checkpoint")
    return len(same), different + [name for name in same if content(one[name]) != content(two[name])]


def torture(
    kills: int, seed: int, place: Path, chains: Sequence[str], layouts: Sequence[str], say: Any = print
) -> int:
    """Returns how many files differ."""
    rng = random.Random(seed)
    done: Counter[str] = Counter()
    runs = compared = 0
    different: list[str] = []
    groups = [(layout, chain) for layout in layouts for chain in chains]
    for number, (layout, chain) in enumerate(groups):
        share = (kills + len(groups) - 1 - number) // len(groups)
        now = prepare(place / "now", chain)  # always the same path: records hold it
        never = {"kind": "never"}
        status, err = start(now, layout, never)
        if status:
            raise SystemExit(f"the run without kills ended with {status}: {err}")
        whole = now.rename(place / f"whole-{chain}-{layout}")
        left = share
        while left:
            runs += 1
            now, status = prepare(place / "now", chain), 1
            while status:
                fault = draw(rng, layout, chain) if left else never
                struck = now / "struck"
                struck.unlink(missing_ok=True)
                status, err = start(now, layout, {**fault, "struck": str(struck)})
                if struck.exists():
                    left -= 1
                    kind = f"{fault['kind']} {fault.get('place', '')}".strip()
                    done[kind] += 1
                    name = signal.Signals(fault["signal"]).name
                    say(f"run {runs}, {chain} of {layout}: {name}, {kind}")
                elif status:
                    raise SystemExit(f"run {runs} ended with {status} though nothing was killed: {err}")
            count, wrong = differences(whole, now.rename(place / f"run-{runs}"))
            compared += count
            different += [f"run-{runs}/{name}" for name in wrong]
    for name in different:
        say(f"differs: {name}")
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(done.items()))
    say(
        f"{sum(done.values())} kills ({kinds}) in {runs} runs: {compared} files compared, "
        f"{len(different)} differences"
    )
    return len(different)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]), sys.argv[3:])
        return
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chain", choices=CHAINS, help="runs of this one alone; default both")
    parser.add_argument("--layout", choices=LAYOUTS, help="of these processes alone; default all")
    parser.add_argument("--out", type=Path, help="folder to keep the runs in; default a temporary one")
    options = parser.parse_args()
    place = options.out or Path(tempfile.mkdtemp())
    try:
        chains = [options.chain] if options.chain else [*CHAINS]
        layouts = [options.layout] if options.layout else [*LAYOUTS]
        wrong = torture(options.kills, options.seed, place.resolve(), chains, layouts)
    finally:
        if options.out is None:
            shutil.rmtree(place)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
