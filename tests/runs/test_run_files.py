"""Files of a run that somebody changed by hand: the run goes on, or refuses in one line before it trains."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from diffkd.cli import main
from diffkd.errors import Interrupted
from diffkd.training import trainer
from tests.edits import edits
from tests.refusals import tree
from tests.runs.conftest import STOPPED
from tests.runs.tiny import records, signal_at, write

MEASURED = {
    **STOPPED, "evaluation": {"samples": 32, "teacher_steps": [8]}, "pictures": 4,
    "method": {"name": "progressive", "steps": [2, 1], "updates": 4, "learning_rate": 1e-3},
    "training": {"batch_size": 16, "log_every": 1, "checkpoint_every": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, tiny_teacher):
    """A folder with distill.yaml and its run, stopped in the second of two stages."""
    here = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        write("distill.yaml", MEASURED, teacher={"path": str(tiny_teacher)}, out="run")
        patch.setattr("sys.argv", ["diffkd", "distill", "distill.yaml"])
        signal_at(patch, "1-steps", 3, send=[signal.SIGTERM])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 130
    return here


@pytest.fixture
def here(stopped, tmp_path, monkeypatch):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def attempt(cli) -> str:
    """How `diffkd distill` ends: the line with which it refuses, or "" where it begins to train."""
    code, _, err = cli("distill", "distill.yaml")
    assert code in (2, 130) and "Traceback" not in err, (code, err)
    return err.splitlines()[-1] if code == 2 else ""


def weights_and_checkpoints(run: Path) -> dict[str, Any]:
    """Without the students' cards, which are written again where metrics.json says otherwise."""
    students = tree(run / "students").items()
    cards = ("README.md", "diffkd.json")
    return {k: v for k, v in students if not k.endswith(cards)} | tree(run / "checkpoints")


FILES = [
    "config.yaml", "environment.json", "inputs.json", "log.jsonl", "metrics.json",
    "checkpoints/stage-01-update-0000003/checkpoint.json", "students/2-steps/diffkd.json",
    "students/2-steps/model_index.json", "students/2-steps/unet/config.json",
    "students/2-steps/scheduler/scheduler_config.json", "students/2-steps/README.md",
]  # fmt: skip


@pytest.mark.parametrize(
    "count", [3, pytest.param(60, marks=pytest.mark.slow)], ids=["few", "many"]
)  # fmt: skip
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_edited(cli, here, monkeypatch, name, count):
    """Some of the edits, each in the run as it was stopped."""

    def began(*args, **options):  # what is wrong with the run's files has been found by now
        raise Interrupted

    monkeypatch.setattr(trainer, "run_update", began)
    shutil.copytree(here / "run", here / "before")
    path = here / "run" / name
    cases = list(edits(path.read_text()))
    outcomes = Counter()
    for what, text in random.Random(0).sample(cases, min(count, len(cases))):
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        kept = weights_and_checkpoints(here / "run")
        measured = (here / "run/metrics.json").read_bytes()
        refused = attempt(cli)
        outcomes["refused" if refused else "began"] += 1
        assert weights_and_checkpoints(here / "run") == kept, what
        assert (here / "run/metrics.json").read_bytes() == measured or not refused, what
        print(f"{name}, {what}: {refused or 'goes on'}")
        shutil.rmtree(here / "run")
        shutil.copytree(here / "before", here / "run")
    print(name, outcomes)
    assert outcomes["refused"] == 0 or name != "log.jsonl"


def test_notes_in_metrics_json_stay(cli, here):
    """They are the user's, and the run ends as without them."""
    path = here / "run/metrics.json"
    notes = ["a line", {"note": "mine"}, {"model": 3, "role": "teacher"}]
    path.write_text(json.dumps([*notes, *json.loads(path.read_text())]))
    assert cli("distill", "distill.yaml").code == 0
    found = records(here / "run")
    assert found[:3] == notes and [(r["model"], r["steps"]) for r in found[3:]] == [
        ("teacher", 8), ("2-steps", 2), ("1-steps", 1)
    ]  # fmt: skip


# links ------------------------------------------------------------------------------------------------


LINKS = [
    ".lock", ".owner.json", ".metrics.json.lock", "config.yaml", "environment.json", "inputs.json",
    "log.jsonl", "metrics.json", "report.html", "checkpoints", "samples", "students", "samples/1-steps.png",
    "checkpoints/stage-01-update-0000003", "checkpoints/stage-01-update-0000004", "students/2-steps",
    "students/1-steps",
]  # fmt: skip
QUICK = ["log.jsonl", ".owner.json", "students/1-steps"]


@pytest.mark.parametrize("dangling", [False, True], ids=["somewhere", "nowhere"])
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LINKS]
)
def test_nothing_is_written_through_a_link(cli, here, tmp_path_factory, name, dangling):
    outside = tmp_path_factory.mktemp("outside")
    path = here / "run" / name
    if path.exists():
        path.rename(outside / "there")
    elif not dangling:
        (outside / "there").write_text("precious")
    path.symlink_to(outside / ("nothing" if dangling else "there"))
    before = tree(outside)
    code, _, err = cli("distill", "distill.yaml")
    assert tree(outside) == before
    assert code == 0 or (code == 2 and err.splitlines()[-1].startswith("diffkd: error: ")), err


def test_a_run_folder_that_is_a_link(cli, here, tmp_path_factory):
    """It is the user's own: a run on another disk."""
    disk = tmp_path_factory.mktemp("disk")
    (here / "run").rename(disk / "run")
    (here / "run").symlink_to(disk / "run")
    assert cli("distill", "distill.yaml").code == 0
    assert (here / "run").is_symlink() and (disk / "run/students/1-steps/model_index.json").is_file()


# what was measured -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["run/metrics.json", "run/students/1-steps/diffkd.json"])
def test_what_was_measured_is_on_the_screen_before_it_is_written(cli, here, monkeypatch, place):
    """A disk that is full when the number comes: it is not lost, and the same command measures no other."""
    real = os.replace

    def full(source, target, *args):
        if str(target) == place:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target, *args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        code, out, err = cli("distill", "distill.yaml")
    assert code == 1 and "the disk is full" in err and "Traceback" not in err
    assert cli("distill", "distill.yaml").code == 0
    [fid] = [r["fid"] for r in records(here / "run") if r["model"] == "1-steps"]
    assert f"1-steps in 1 step: FID {fid:.3f}"[:-2] in out


def test_what_was_measured_is_written_where_the_screen_is_gone(cli, here, monkeypatch):
    from diffkd.runs.session import Session

    def gone(self, text):
        raise BrokenPipeError

    monkeypatch.setattr(Session, "say", gone)
    for _ in range(4):  # each ends where it says something
        cli("distill", "distill.yaml")
    assert any(r["model"] == "2-steps" for r in records(here / "run"))
