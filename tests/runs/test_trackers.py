"""Trackers: what they store, read back from each that is installed; that a resumed run goes on in its log,
whatever ended it; and that training knows nothing of them."""

from __future__ import annotations

import json
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import tracking
from PIL import Image

from diffkd.errors import Interrupted, Unfinished
from diffkd.runs import tracker_state, trackers
from diffkd.runs.callbacks import Callbacks
from diffkd.runs.trackers import Tracker
from tests.edits import edits
from tests.refusals import refuse
from tests.runs import tracked
from tests.runs.conftest import STOPPED
from tests.runs.tiny import assert_same_runs, records, signal_at, write

CONFIG = {"out": "runs/x", "training": {"batch_size": 16, "betas": [0.9, 0.999]}, "evaluation": None}
NONE = np.zeros((0, 8, 8, 1), dtype=np.uint8)  # pictures are read from samples/
SIZE = (270, 32)
MEASURED = ["pictures=3", "evaluation={samples: 16, teacher_steps: [4]}"]
OTHERS = ("wandb", "mlflow", "trackio")


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_teacher):
    monkeypatch.chdir(tmp_path)
    write("distill.yaml", STOPPED, teacher={"path": str(tiny_teacher)})
    return tmp_path


# the trackers themselves ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")  # of their own
@pytest.mark.parametrize("name", ["tensorboard", *OTHERS])
def test_a_run_that_broke_off_goes_on_in_its_log(name, here, cli, monkeypatch, unstopped):
    """Each update once, with the numbers of log.jsonl; the students are those of a run without trackers."""
    for variable, value in (
        ("HOME", here / "home"),
        ("WANDB_MODE", "offline"),
        ("WANDB_SILENT", "true"),
        ("WANDB_PROJECT", "diffkd"),
        ("MLFLOW_TRACKING_URI", f"sqlite:///{here}/mlflow.db"),
        ("TRACKIO_PROJECT", "diffkd"),
        ("TRACKIO_DIR", here / "trackio"),
    ):
        monkeypatch.setenv(variable, str(value))
    pytest.importorskip(name)

    def breaks() -> None:
        raise Unfinished("broken off")

    more = [f"training.trackers=[{name}]", *MEASURED]
    with monkeypatch.context() as patch:
        signal_at(patch, "1-steps", 7, call=breaks)  # update 15; the last checkpoint is of update 13
        assert cli("distill", "distill.yaml", "out=run", *more).code == 1
    states = name in ("wandb", "mlflow")
    assert getattr(tracked, name)(here / "run").finished == (False if states else None)
    code, _, err = cli("distill", "distill.yaml", "out=run", *more)
    assert code == 0 and (err == "" or name != "tensorboard") and "failed" not in err
    assert_same_runs(unstopped, here / "run")
    found = getattr(tracked, name)(here / "run")
    assert found.finished == (True if states else None)
    losses = found.numbers["train/loss"]
    logged = [json.loads(line)["loss"] for line in (here / "run/log.jsonl").read_text().splitlines()]
    assert [step for step, _ in losses] == [*range(1, 25)]
    assert [value for _, value in losses] == pytest.approx(logged, rel=1e-6)
    fids = {r["model"]: r["fid"] for r in records(here / "run")}
    for model, tag, step in (
        ("teacher", "teacher-4-steps", 0),
        ("4-steps", "4-steps", 8),
        ("1-steps", "1-steps", 24),
    ):
        assert found.numbers[f"evaluation/{tag}/fid"] == [(step, pytest.approx(fids[model], rel=1e-6))]
        with Image.open(here / f"run/samples/{tag}.png") as sheet:
            assert found.pictures[f"samples/{tag}"] == [(None if name == "mlflow" else step, sheet.size)]
    assert str(found.config["training.batch_size"]) == "16"
    if name != "tensorboard":  # whose log is a folder
        assert len(found.runs) == 1 and found.titles == {("diffkd", "run")}


def test_one_that_is_not_installed(here, cli, monkeypatch):
    find_spec = trackers.importlib.util.find_spec

    def lacks_mlflow(name: str, *rest: Any) -> Any:
        known = types.SimpleNamespace() if name == "trackio" else find_spec(name, *rest)
        return None if name == "mlflow" else known

    monkeypatch.setattr(trackers.importlib.util, "find_spec", lacks_mlflow)
    monkeypatch.delitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", raising=False)
    for name, says in (
        ("mlflow", ["training.trackers has mlflow", "pip install mlflow (extra mlflow)"]),
        ("trackio", ["has trackio, which accelerate", "does not know; install a newer accelerate"]),
        ("tensorbord", ["training.trackers.0 is 'tensorbord'", "'tensorboard'"]),
    ):
        refuse(cli, here, "distill", "distill.yaml", f"training.trackers=[{name}]", says=says)


# all of them but TensorBoard, by stand-ins of accelerate's classes ------------------------------------


class StandIn:
    """Has the methods of accelerate's trackers, and keeps what they were called with. error: of `log`."""

    calls: list[tuple[Any, ...]] = []
    error: Exception | None = None
    step = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append(("made", *args, kwargs))
        identity = types.SimpleNamespace(run_id=kwargs.get("run_id") or "given")
        self.tracker = types.SimpleNamespace(info=identity, step=self.step)

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            if name == "log" and self.error is not None:
                raise self.error
            self.calls.append((name, *args, kwargs))

        return call


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(StandIn, "calls", [])
    for name in OTHERS:
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, StandIn)
    fake = types.ModuleType("trackio")
    fake.Image = lambda picture: ("image", picture.size)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", fake)
    for name in ("WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return StandIn.calls


def steps(calls: list[tuple[Any, ...]], name: str = "train/loss") -> list[int]:
    """At which updates this number was told, in their order."""
    return [call[-1]["step"] for call in calls if call[0] == "log" and name in call[1]]


def began(name: str, folder: Path) -> Tracker:
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    Image.new("L", SIZE).save(folder / "samples/4-steps.png")
    tracker = Tracker(name)  # type: ignore[arg-type]
    tracker.on_start(folder, CONFIG)
    return tracker


def measured(tracker: Tracker, update: int) -> None:
    tracker.on_evaluation(
        update, {"model": "4-steps", "role": "student", "steps": 4, "fid": 2.5, "protocol": {}}
    )
    tracker.on_images(update, "4-steps", NONE)


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_others_are_told(name, calls, tmp_path):
    folder = tmp_path / "digits"
    tracker = began(name, folder)
    tracker.on_log(
        3, {"stage": "4-steps", "update": 3, "updates": 8, "loss": 0.5, "loss_by_noise": [1.0, None]}
    )
    measured(tracker, 8)
    tracker.on_end()
    identity = json.loads((folder / "trackers.json").read_text())[name]["id"]
    made = {
        "wandb": {"id": identity, "name": "digits", "resume": "allow", "dir": str(folder)},
        "mlflow": {"run_id": None, "run_name": "digits"},
        "trackio": {"name": identity, "resume": "allow"},
    }
    config = {"out": "runs/x", "training.batch_size": 16, "training.betas": "[0.9, 0.999]"}
    opened = [
        ("made", "diffkd", made[name]),
        ("start", {}),
        ("store_init_configuration", {**config, "evaluation": "null"}, {}),
    ]
    assert calls[:5] == [
        *opened,
        ("log", {"train/loss": 0.5, "train/loss_by_noise/0": 1.0}, {"step": 3}),
        ("log", {"evaluation/4-steps/steps": 4, "evaluation/4-steps/fid": 2.5}, {"step": 8}),
    ]
    pictures, finish = calls[5:]
    assert finish == ("finish", {})
    if name == "wandb":
        assert pictures[0] == "log_images" and pictures[2] == {"step": 8}
        assert pictures[1]["samples/4-steps"][0].size == SIZE
    elif name == "trackio":
        assert pictures == ("log", {"samples/4-steps": ("image", SIZE)}, {"step": 8})
    else:
        assert pictures == ("log_artifact", str(folder / "samples/4-steps.png"), "samples", {})
    del calls[:]
    tracker = began(name, folder)  # resumed, from a checkpoint before all of it
    tracker.on_log(3, {"update": 3, "loss": 0.5})
    measured(tracker, 8)
    tracker.on_log(9, {"update": 1, "loss": 0.25})
    tracker.on_end()
    if name == "mlflow":  # refuses a config that it has; the others would be without one
        opened = [("made", "diffkd", {"run_id": "given", "run_name": "digits"}), ("start", {})]
    assert calls == [*opened, ("log", {"train/loss": 0.25}, {"step": 9}), ("finish", {})]


@pytest.mark.parametrize(
    ("error", "status"), [(Interrupted(), "KILLED"), (Unfinished("the disk is full"), "FAILED")]
)
def test_a_run_that_was_stopped_or_failed_is_not_finished_there(error, status, calls, tmp_path, monkeypatch):
    ended: list[str] = []
    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(end_run=ended.append))  # type: ignore[arg-type]
    for name in OTHERS:
        tracker = began(name, tmp_path / name)
        tracker._tracker.tracker.finish = lambda exit_code: ended.append(f"exit status {exit_code}")
        with pytest.raises(type(error)), Callbacks([tracker]).of_run(tmp_path / name, CONFIG):
            raise error
    assert ended == ["exit status 1", status]
    assert [call[0] for call in calls].count("finish") == 2  # of accelerate, without wandb's


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("seconds", [0.0, math.inf])
def test_after_a_kill_they_are_told_what_they_may_have_lost(name, seconds, calls, tmp_path, monkeypatch):
    """seconds: for which they may have in memory alone what they were told. MLflow has it at once."""
    monkeypatch.setattr(tracker_state, "HELD", {"wandb": seconds, "trackio": seconds})
    tracker = began(name, tmp_path)
    for update in (7, 8):
        tracker.on_log(update, {"loss": 0.5})
    measured(tracker, 8)
    del calls[:]
    tracker = began(name, tmp_path)  # without on_end of the other
    tracker.on_log(8, {"loss": 0.5})  # done again from a checkpoint
    tracker.on_log(9, {"loss": 0.5})
    lost = [7, 8] if seconds and name != "mlflow" else []
    assert steps(calls) == [*lost, 9]
    assert steps(calls, "evaluation/4-steps/fid") == lost[1:]


def test_a_measurement_that_a_kill_parted_from_its_update_is_not_lost(calls, tmp_path, monkeypatch):
    """wandb takes nothing of an update before the one that it is at: 9, where 8 was sent before the kill."""
    monkeypatch.setattr(StandIn, "step", 9)
    tracker = began("wandb", tmp_path)
    measured(tracker, 8)
    assert steps(calls, "evaluation/4-steps/fid") == [9]
    assert calls[-1][0] == "log_images" and calls[-1][-1] == {"step": 9}
    tracker.on_log(8, {"loss": 0.5})
    assert steps(calls) == [8]  # which wandb has, and drops


def test_a_file_of_identities_that_was_edited_is_lived_with(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    path, given = tmp_path / "trackers.json", set()
    mine = {
        "id": "mine",
        "last": {"train/loss": 3},
        "waiting": [{"update": 3, "values": {"train/loss": 1.0}}],
    }
    for of_wandb in ("mine", mine):  # as older runs have it, and as it is
        for what, text in edits(json.dumps({"wandb": of_wandb, "mlflow": "theirs"})):
            path.write_text(text, encoding="utf-8", errors="surrogatepass")
            del calls[:]
            began("wandb", tmp_path)
            identity = calls[0][-1]["id"]
            assert json.loads(path.read_text())["wandb"]["id"] == identity, what
            given.add(identity)
    assert "mine" in given and len(given) > 20
    path.write_text(json.dumps({"wandb": mine}))
    del calls[:]
    tracker = began("wandb", tmp_path)
    for update in (3, 4):
        tracker.on_log(update, {"loss": 1.0})
    assert steps(calls) == [3, 4]


# trackers that fail -----------------------------------------------------------------------------------


def test_one_that_fails_as_a_run_begins_ends_it_in_one_line(monkeypatch, tmp_path, calls):
    def offline(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route\nto anywhere")

    monkeypatch.setattr(StandIn, "start", offline, raising=False)
    with pytest.raises(
        Unfinished, match=r"tracker wandb failed \(ConnectionError: no route\); what is done is kept"
    ):
        Tracker("wandb").on_start(tmp_path, CONFIG)
    assert not (tmp_path / "trackers.json").exists()


def test_one_that_fails_is_tried_again_at_each_checkpoint(monkeypatch, tmp_path, calls, caplog):
    tracker = began("mlflow", tmp_path)
    tracker.on_log(1, {"loss": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(StandIn, "error", ConnectionError("no route"))
        for update in (2, 3):
            tracker.on_log(update, {"loss": 1.0})
            tracker.on_checkpoint(tmp_path)
    (warned,) = [record.getMessage() for record in caplog.records]
    assert "tracker mlflow failed (ConnectionError: no route); training goes on" in warned
    tracker.on_log(4, {"loss": 1.0})
    assert steps(calls) == [1]  # a server that does not answer may take minutes, and not at every update
    tracker.on_checkpoint(tmp_path)
    tracker.on_log(5, {"loss": 1.0})
    assert steps(calls) == [1, 2, 3, 4, 5]
    with monkeypatch.context() as patch:
        patch.setattr(StandIn, "error", ConnectionError("no route"))
        for update in (6, 7):
            tracker.on_log(update, {"loss": 1.0})
        with pytest.raises(Unfinished, match=r"tracker mlflow failed .*; what it was not told waits in"):
            tracker.on_end()
    began("mlflow", tmp_path).on_end()
    assert steps(calls) == [*range(1, 8)]
    assert json.loads((tmp_path / "trackers.json").read_text())["mlflow"]["waiting"] == []


def test_a_run_whose_tracker_fails_is_trained_and_told_by_the_same_command(
    here, cli, monkeypatch, calls, unstopped
):
    """From the FID at update 8 on, to the end; another tracker misses nothing."""
    log = StandIn.__getattr__

    def fails_at_8(self: StandIn, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            if name == "log" and self.tracker.step == 0 and kwargs["step"] >= 8 and "evaluation" in str(args):
                self.tracker.step = 1  # from now on
            if name == "log" and self.tracker.step:
                raise ConnectionError("no route")
            log(self, name)(*args, **kwargs)

        return call

    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name, *rest: types.SimpleNamespace())
    arguments = ["distill", "distill.yaml", "out=run", "training.trackers=[mlflow, tensorboard]", *MEASURED]
    with monkeypatch.context() as patch:
        patch.setattr(StandIn, "__getattr__", fails_at_8)
        code, _, err = cli(*arguments)
    warned, failed = err.splitlines()
    assert code == 1 and "training goes on" in warned
    assert "what it was not told waits in trackers.json, and the students are as without it" in failed
    assert_same_runs(unstopped, here / "run")
    assert [step for step, _ in tracked.tensorboard(here / "run").numbers["train/loss"]] == [*range(1, 25)]
    assert steps(calls) == [*range(1, 9)] and calls[-1] == ("finish", {})
    code, _, err = cli(*arguments)
    assert (code, err) == (0, "")
    assert steps(calls) == [*range(1, 25)]
    assert steps(calls, "evaluation/4-steps/fid") == [8] and steps(calls, "evaluation/1-steps/fid") == [24]
    pictures = [Path(call[1]).name for call in calls if call[0] == "log_artifact"]
    assert pictures == ["teacher-4-steps.png", "4-steps.png", "1-steps.png"]
