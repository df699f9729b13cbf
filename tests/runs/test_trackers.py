"""Trackers: what accelerate's own are told, that a resumed run goes on in its log, and that training knows
nothing of it."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from accelerate import tracking
from PIL import Image

from diffkd.errors import Unfinished
from diffkd.runs import trackers
from diffkd.runs.trackers import Tracker
from tests.edits import edits
from tests.refusals import refuse
from tests.runs.conftest import STOPPED
from tests.runs.tiny import assert_same_runs, records, signal_at, write

CONFIG = {"out": "runs/x", "training": {"batch_size": 16, "betas": [0.9, 0.999]}, "evaluation": None}
IMAGES = np.arange(3 * 8 * 8, dtype=np.uint8).reshape(3, 8, 8, 1)


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_teacher):
    monkeypatch.chdir(tmp_path)
    write("distill.yaml", STOPPED, teacher={"path": str(tiny_teacher)})
    return tmp_path


# TensorBoard, itself ----------------------------------------------------------------------------------


def test_a_run_that_broke_off_goes_on_in_its_log(here, cli, monkeypatch, unstopped):
    """Each update once, with the numbers of log.jsonl; the students are those of a run without trackers."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def breaks() -> None:
        raise Unfinished("broken off")

    more = ["training.trackers=[tensorboard]", "pictures=3", "evaluation={samples: 16, teacher_steps: [4]}"]
    with monkeypatch.context() as patch:
        signal_at(patch, "1-steps", 7, call=breaks)  # update 15; the last checkpoint is of update 13
        assert cli("distill", "distill.yaml", "out=run", *more).code == 1
    code, _, err = cli("distill", "distill.yaml", "out=run", *more)
    assert (code, err) == (0, "")
    assert_same_runs(unstopped, here / "run")
    found = EventAccumulator(
        str(here / "run/tensorboard"), size_guidance={"scalars": 0, "images": 0}
    ).Reload()
    loss = found.Scalars("train/loss")
    logged = [json.loads(line)["loss"] for line in (here / "run/log.jsonl").read_text().splitlines()]
    assert [event.step for event in loss] == [*range(1, 25)]
    assert [event.value for event in loss] == pytest.approx(logged, rel=1e-6)
    fids = {r["model"]: r["fid"] for r in records(here / "run")}
    for model, tag, step in (
        ("teacher", "teacher-4-steps", 0),
        ("4-steps", "4-steps", 8),
        ("1-steps", "1-steps", 24),
    ):
        (event,) = found.Scalars(f"evaluation/{tag}/fid")
        assert (event.step, event.value) == (step, pytest.approx(fids[model], rel=1e-6))
        (image,) = found.Images(f"samples/{tag}")
        with Image.open(here / f"run/samples/{tag}.png") as sheet:
            assert (image.step, image.width, image.height) == (step, *sheet.size)
    (hyperparameters,) = (here / "run/tensorboard").rglob("hparams.yml")
    assert yaml.safe_load(hyperparameters.read_text())["training.batch_size"] == 16


def test_one_that_is_not_installed(here, cli, monkeypatch):
    find_spec = trackers.importlib.util.find_spec
    monkeypatch.setattr(
        trackers.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "mlflow" else find_spec(name, *rest),
    )
    for name, says in (
        ("mlflow", ["training.trackers has mlflow", "pip install mlflow (extra mlflow)"]),
        ("tensorbord", ["training.trackers.0 is 'tensorbord'", "'tensorboard'"]),
    ):
        refuse(cli, here, "distill", "distill.yaml", f"training.trackers=[{name}]", says=says)


# the others, by stand-ins of accelerate's classes -----------------------------------------------------


class StandIn:
    """Has the methods of accelerate's trackers, and keeps what they were called with."""

    calls: list[tuple[Any, ...]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append(("made", *args, kwargs))
        self.tracker = types.SimpleNamespace(
            info=types.SimpleNamespace(run_id=kwargs.get("run_id") or "given")
        )

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.append((name, *args, kwargs))


@pytest.fixture
def calls(monkeypatch):
    StandIn.calls = []
    for name in ("wandb", "mlflow", "trackio"):
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, StandIn)
    fake = types.ModuleType("trackio")
    fake.Image = lambda picture: ("image", picture.size)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", fake)
    for name in ("WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return StandIn.calls


def told(name: str, folder: Path) -> None:
    """A short run."""
    tracker = Tracker(name)
    tracker.on_start(folder, CONFIG)
    tracker.on_log(
        3, {"stage": "4-steps", "update": 3, "updates": 8, "loss": 0.5, "loss_by_noise": [1.0, None]}
    )
    tracker.on_evaluation(8, {"model": "4-steps", "role": "student", "steps": 4, "fid": 2.5, "protocol": {}})
    tracker.on_images(8, "4-steps", IMAGES)
    tracker.on_end()


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_what_the_others_are_told(name, calls, tmp_path):
    folder = tmp_path / "digits"
    folder.mkdir()
    told(name, folder)
    identity = json.loads((folder / "trackers.json").read_text())[name]
    made = {
        "wandb": ("diffkd", {"id": identity, "name": "digits", "resume": "allow", "dir": str(folder)}),
        "mlflow": ("diffkd", {"run_id": None, "run_name": "digits"}),
        "trackio": ("diffkd", {"name": identity, "resume": "allow"}),
    }
    assert calls[0] == ("made", *made[name])
    betas = {"training.betas": "[0.9, 0.999]"}
    assert calls[1:5] == [
        ("start", {}),
        ("store_init_configuration", {
            "out": "runs/x", "training.batch_size": 16, **betas, "evaluation": "null",
        }, {}),
        ("log", {"train/loss": 0.5, "train/loss_by_noise/0": 1.0}, {"step": 3}),
        ("log", {"evaluation/4-steps/steps": 4, "evaluation/4-steps/fid": 2.5}, {"step": 8}),
    ]  # fmt: skip
    pictures, finish = calls[5:]
    assert finish == ("finish", {})
    if name == "wandb":
        assert pictures[0] == "log_images" and pictures[2] == {"step": 8}
        assert pictures[1]["samples/4-steps"][0].size == (270, 32)
    elif name == "trackio":
        assert pictures == ("log", {"samples/4-steps": ("image", (270, 32))}, {"step": 8})
    else:
        assert (
            pictures[0] == "log_artifact"
            and Path(pictures[1]).name == "4-steps.png"
            and pictures[2] == "samples"
        )
    del calls[:]
    told(name, folder)  # resumed: the same log, whose config is known
    first = dict(made[name][1], **({"run_id": "given"} if name == "mlflow" else {}))
    assert calls[0] == ("made", "diffkd", first)
    assert [call[0] for call in calls].count("store_init_configuration") == 0


def test_a_file_of_identities_that_was_edited_is_lived_with(calls, tmp_path):
    path, given = tmp_path / "trackers.json", set()
    for what, text in edits(json.dumps({"wandb": "mine", "mlflow": "theirs"})):
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        del calls[:]
        Tracker("wandb").on_start(tmp_path, CONFIG)
        identity = calls[0][-1]["id"]
        assert json.loads(path.read_text())["wandb"] == identity, what
        given.add(identity)
    assert "mine" in given and len(given) > 10


def test_a_tracker_that_fails_ends_the_run_in_one_line(monkeypatch, tmp_path, calls):
    def offline(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route\nto anywhere")

    monkeypatch.setattr(StandIn, "log", offline, raising=False)
    tracker = Tracker("wandb")
    tracker.on_start(tmp_path, CONFIG)
    with pytest.raises(
        Unfinished, match=r"tracker wandb failed \(ConnectionError: no route\); what is done is kept"
    ):
        tracker.on_log(1, {"loss": 1.0})
