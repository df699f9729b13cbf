"""diffkd from Python: the same runs and numbers as by the command, from objects in place of names."""

from __future__ import annotations

import doctest
import importlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from PIL import Image

import diffkd
from diffkd.errors import UserError
from diffkd.io import naming, processes
from diffkd.runs import config_files, distilled, session
from tests.runs.conftest import QUIET, STOPPED
from tests.runs.tiny import assert_same_runs, network, same

METHOD = {key: value for key, value in STOPPED["method"].items() if key != "steps"}
REST = {key: STOPPED[key] for key in ("training", "evaluation", "pictures")}


class Recorder(diffkd.Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def on_start(self, folder, config):
        self.seen.append(("start", folder, config["training"]["batch_size"]))

    def on_log(self, update, values):
        self.seen.append(("log", update, values["stage"], values["update"]))
        values.clear()  # a copy

    def on_checkpoint(self, folder):
        self.seen.append(("checkpoint", folder.name, (folder / "checkpoint.json").exists()))

    def on_error(self, error):
        self.seen.append(("error", error))

    def on_end(self):
        self.seen.append(("end",))

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [event[1:] for event in self.seen if event[0] == kind]


# examples ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        "generation.generator",
        "models.loading",
        "runs.distilled",
        "runs.evaluate",
        "runs.saving",
        "runs.stats",
    ],
)
def test_examples_of_docstrings(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(importlib.import_module(f"diffkd.{module}"))
    assert found.attempted >= 4 and found.failed == 0


def test_every_public_function_has_an_example():
    for name in ("compute_statistics", "distill", "evaluate", "generate", "load", "save"):
        assert ">>> " in getattr(diffkd, name).__doc__, name


# distill ----------------------------------------------------------------------------------------------


def test_a_callback_ends_a_run_and_the_same_call_resumes_it(tmp_path, unstopped, tiny_teacher):
    """With the bits of the command's run; updates are counted over both stages, of 8 and 16."""

    def fails(update, values):
        if update == 15:
            raise LookupError("of the user's own")

    call = {"method": METHOD, "steps": [4, 1], "out": tmp_path / "run", "quiet": True, **REST}
    first, second = Recorder(), Recorder()
    with pytest.raises(LookupError, match="of the user's own") as failed:
        diffkd.distill(tiny_teacher, "digits", callbacks=[first, fails], **call)
    assert [update for update, *_ in first.of("log")] == [*range(1, 16)]
    assert first.of("log")[-1] == (15, "1-steps", 7)
    assert first.seen[-2:] == [("error", failed.value), ("end",)]
    run = diffkd.distill(diffkd.load(tiny_teacher), "digits", callbacks=[second], **call)
    assert [update for update, *_ in second.of("log")] == [*range(14, 25)]
    assert second.seen[0] == ("start", tmp_path / "run", 16) and second.seen[-1] == ("end",)
    assert second.of("error") == []
    told = [(name, whole) for recorder in (first, second) for name, whole in recorder.of("checkpoint")]
    names = [f"stage-{name}" for name in ("00-update-0000005", "01-update-0000010", "01-update-0000015")]
    # one more may have been written when the callback failed, two updates after it was begun
    assert [(name, whole) for name, whole in told if name != "stage-01-update-0000005"] == [
        (name, True) for name in names
    ]
    assert_same_runs(unstopped, run.folder)
    assert [*run.students] == [4, 1] and [*run.models] == ["4-steps", "1-steps"] and run.records == []
    assert run.load(1).steps == run.load("1-steps").steps == 1
    with pytest.raises(UserError, match="has no student 2; there are 4, 1"):
        run.load(2)
    with pytest.raises(UserError, match="no student of .* was measured"):
        _ = run.best
    with pytest.raises(UserError, match=r"belongs to a run with another config \(training.ema"):
        diffkd.distill(tiny_teacher, "digits", **{**call, "training": {**REST["training"], "ema": 0.5}})


def test_what_was_measured(tmp_path, tiny_teacher):
    """Of two students of one step count, the later is that of the count; the best is of the lowest FID."""
    seen = []

    class Evaluations(diffkd.Callback):
        def on_evaluation(self, update, record):
            seen.append((update, record["model"], record["fid"]))

        def on_images(self, update, name, images):
            seen.append((update, name, images.shape, images.dtype))

    settings = {"updates": 2, "learning_rate": 1e-3}
    run = diffkd.distill(
        tiny_teacher, "digits", out=tmp_path / "run", quiet=True, callbacks=[Evaluations()], pictures=3,
        method=[{"name": "progressive", "steps": [2], **settings}, {"name": "dmd2", "steps": 2, **settings}],
        training={"batch_size": 8}, evaluation={"samples": 16, "teacher_steps": [4]}, spread_every=None,
    )  # fmt: skip
    updates = {update for update, *_ in seen}
    assert len(updates) == 3 and min(updates) == 0
    fids = {r["model"]: r["fid"] for r in run.records}
    assert [event[1] for event in seen] == [
        "teacher", "teacher-4-steps", "2-steps", "2-steps", "2-steps-dmd2", "2-steps-dmd2",
    ]  # fmt: skip
    assert seen[1][2:] == ((3, 8, 8, 1), np.uint8) and seen[2][2] == fids["2-steps"]
    assert [*run.models] == ["2-steps", "2-steps-dmd2"] and run.students == {2: run.models["2-steps-dmd2"]}
    best = min(("2-steps", "2-steps-dmd2"), key=fids.__getitem__)
    assert same(run.best.network.state_dict(), network(run.models[best]))


@pytest.fixture
def settings(monkeypatch):
    """settings(*args, **kwargs) -> the config that distill would run."""
    ran: list[Any] = []
    monkeypatch.setattr(distilled.job, "distill", lambda config, *rest: ran.append((config, rest)))

    def of(*args, **kwargs):
        diffkd.distill(*args, **{"out": "run", **kwargs})
        return ran[-1][0]

    return of


def test_what_is_given_becomes_a_config(settings, tmp_path, monkeypatch, make_pipeline, image_folder):
    monkeypatch.chdir(tmp_path)
    teacher, images = make_pipeline(tmp_path, channels=3, size=16), image_folder(tmp_path)
    folder = settings(teacher, images).data
    assert (folder.kind, folder.size, folder.channels, folder.path) == ("folder", 16, 3, images)
    assert settings(diffkd.load(teacher), str(images)).data == folder
    hub = settings(str(teacher), "owner/name").data
    assert (hub.kind, hub.path, hub.size) == ("datasets", "owner/name", 16)
    assert settings(teacher, None, method="dmd2", evaluation=None).data.kind == "none"
    assert settings(teacher, "digits", steps=2).method[0].steps == [2]
    assert settings(teacher, "digits", method="dmd2", steps=2).method[0].steps == 2
    given = settings(
        {"path": str(teacher)}, {"kind": "digits"}, method={"name": "lcm"}, seed=3, training={"ema": 0}
    )
    assert (given.seed, given.training.ema, given.teacher.path) == (3, 0, str(teacher))
    assert naming.called("x.y") == "y"  # as in Python again


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"trianing": {}}, "config key trianing is unknown; did you mean training?"),
        ({"training": {"ema": 2}}, "config key training.ema is 2: input should be less than 1"),
        ({"method": "progresive"}, "method 'progresive' is unknown; use"),
        ({"method": ["dmd2", "sid"], "steps": 4}, "steps 4 is for one method; give each its own"),
        ({"method": "output", "steps": 4}, "steps 4 is for methods that end at a number of them"),
        ({"data": "nowhere"}, "data 'nowhere' is no folder; give one, digits, shapes"),
        ({"teacher": {"path": "x"}, "data": "a/b"}, "say no size; give a mapping: {'kind'"),
        ({"teacher": "nowhere"}, "nowhere is neither a pipeline's folder nor a hub id"),
        ({"device": "gpu9"}, "device 'gpu9' cannot be used"),
        ({"callbacks": [3]}, "callback 3 is neither a function"),
        ({"callbacks": [Recorder]}, "is neither a function (update, values) nor a diffkd.Callback"),
        ({"method": "logits"}, "method logits distils a classifier"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(given, says, tmp_path, monkeypatch, tiny_teacher):
    monkeypatch.chdir(tmp_path)
    call = {"teacher": tiny_teacher, "data": "digits", "out": "run", "quiet": True, **given}
    with pytest.raises(UserError) as error:
        diffkd.distill(**call)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not Path("run").exists()


@pytest.mark.parametrize("main", [True, False])
def test_only_the_main_process_tells(main, tmp_path):
    own = {"out": tmp_path / "run", "teacher": {"path": "x"}, "data": {"kind": "digits"}, "method": METHOD}
    config, recorder = config_files.distill_of({**own, **REST}), Recorder()
    process = SimpleNamespace(
        is_main_process=main, num_processes=1, device=torch.device("cpu"), distributed_type=DistributedType.NO
    )
    images = SimpleNamespace(digest=lambda: "")
    with session.open_run(config, process, images, QUIET, callbacks=[recorder]) as opened:
        opened.told.on_log(1, {"stage": "4-steps", "update": 1})
    assert [event[0] for event in recorder.seen] == (["start", "log", "end"] if main else [])


def test_a_misspelt_method_of_a_callback_is_refused(tmp_path, tiny_teacher):
    class Misspelt(diffkd.Callback):
        def on_logs(self, update, values):
            raise AssertionError

    with pytest.raises(UserError, match="Misspelt has on_logs, which nothing calls; did you mean on_log?"):
        diffkd.distill(tiny_teacher, "digits", out=tmp_path / "run", callbacks=[Misspelt()], quiet=True)


def test_a_denoiser_that_is_no_folders_is_refused(tmp_path, tiny_teacher):
    teacher = diffkd.load(tiny_teacher)
    next(teacher.network.parameters()).data += 1
    with pytest.raises(UserError, match="is not what .* holds: it was changed"):
        diffkd.distill(teacher, "digits", out=tmp_path / "run", quiet=True)
    own = diffkd.Denoiser(teacher.network, teacher.schedule, teacher.prediction)
    with pytest.raises(UserError, match=r"its network fails when .* \(class_labels should be provided"):
        diffkd.save(own, tmp_path / "own")
    own.num_classes, own.null_label = 10, 10
    with pytest.raises(UserError, match=r"lies in no folder \(the model\); write it by diffkd.save"):
        diffkd.distill(own, "digits", out=tmp_path / "run", quiet=True)
    diffkd.save(own, tmp_path / "own")
    assert same(network(tmp_path / "own"), dict(teacher.network.state_dict()))
    assert diffkd.load(tmp_path / "own").null_label == 10
    with pytest.raises(UserError, match="exists already"):
        diffkd.save(own, tmp_path / "own")


def test_a_device_is_chosen_for_one_call_alone(monkeypatch):
    monkeypatch.delenv(processes.DEVICE, raising=False)
    monkeypatch.setenv(processes.USE_CPU, "false")
    before = PartialState().device
    with processes.on_device("cpu"):
        assert (os.environ[processes.DEVICE], os.environ[processes.USE_CPU]) == ("cpu", "true")
        assert PartialState().device == torch.device("cpu")
    assert processes.DEVICE not in os.environ and os.environ[processes.USE_CPU] == "false"
    assert PartialState().device == before
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("meta"))  # of an earlier call
    with processes.on_device(None):
        assert PartialState().device == before
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="device cpu is for one process"):
        diffkd.distill("teacher", "digits", out="run", device="cpu")


# evaluate and compute_statistics ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def grey() -> np.ndarray:
    """A reference."""
    return np.random.default_rng(1).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def measured(pixels, grey, tmp_path_factory) -> float:
    """FID of these images against those, by their files."""
    folder = tmp_path_factory.mktemp("measured")
    np.savez(folder / "images.npz", arr_0=pixels)
    np.savez(folder / "reference.npz", arr_0=grey)
    return diffkd.evaluate(folder / "images.npz", folder / "reference.npz", features="digits")["fid"]


FORMS = {
    "array": lambda x: x,
    "channels first": lambda x: x.transpose(0, 3, 1, 2),
    "tensor": torch.from_numpy,
    "float": lambda x: torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255,
    "float64": lambda x: x / 255,
    "batches": lambda x: (torch.from_numpy(part) for part in np.array_split(x, 4)),
    "one by one": lambda x: iter(x),
    "PIL": lambda x: [Image.fromarray(one) for one in x],
}


@pytest.mark.parametrize("form", FORMS)
def test_images_in_memory_measure_as_those_in_a_file(form, pixels, grey, measured):
    record = diffkd.evaluate(FORMS[form](pixels), grey, features="digits")
    assert record["fid"] == measured and record["protocol"]["target"]["kind"] == "memory"
    json.dumps(record)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (np.zeros((4, 8, 8, 2), np.uint8), "images of shape (4, 8, 8, 2) are given; give (N, H, W, C)"),
        (np.zeros((4, 3, 8, 3), np.uint8), "images of shape (4, 3, 8, 3) are given"),
        (np.zeros((4, 8, 8), np.uint8), "images of shape (4, 8, 8) are given"),
        (torch.full((4, 3, 8, 8), -1.0), "values from -1 to -1 are given; give values in [0, 1]"),
        (torch.full((4, 3, 8, 8), torch.nan), "images with NaN or infinite values"),
        (np.zeros((4, 3, 8, 8), int), "images of int64 are given; give uint8, or float"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], "several shapes (8x8x3 and 8x9x3"),
        (np.zeros((1, 8, 8, 3), np.uint8), "1 image is given; a covariance needs at least 2"),
        ([], "0 images are given; a covariance needs at least 2"),
        ([{}], "{} is no image; give arrays"),
        (3, "3 is no image"),
    ],
)  # fmt: skip
def test_what_is_no_set_of_images_is_refused(images, says):
    with pytest.raises(UserError) as error:
        diffkd.evaluate(images, "digits")
    assert says in str(error.value)


def test_a_model_that_is_open_measures_as_its_folder(tmp_path, make_pipeline, monkeypatch, grey):
    monkeypatch.chdir(tmp_path)
    folder = make_pipeline(tmp_path)
    options = {"steps": 2, "samples": 20, "features": "digits"}
    by_path = diffkd.evaluate(folder, grey, **options)
    opened = diffkd.load("pipeline")
    record = diffkd.evaluate(opened, grey, **options)
    ignored = {"seconds", "protocol"}
    assert {k: v for k, v in record.items() if k not in ignored} == {
        k: v for k, v in by_path.items() if k not in ignored
    }
    assert record["protocol"]["target"] == by_path["protocol"]["target"]
    drawn = diffkd.generate(opened, 20, steps=2, batch_size=7)
    assert diffkd.evaluate(drawn, grey, features="digits")["fid"] == record["fid"]
    for more in ({"variant": "fp16"}, {"null_label": 3}, {"sampler": "stock"}, {"worse": "x"}):
        with pytest.raises(UserError, match="is for a model that is opened by its path"):
            diffkd.evaluate(opened, grey, **options, **more)
    with pytest.raises(UserError, match="steps is for models, and images in memory is a set of images"):
        diffkd.evaluate(np.zeros((4, 8, 8, 1), np.uint8), "digits", steps=2)
    with pytest.raises(UserError, match="option 'sampels' is unknown; did you mean samples?"):
        diffkd.evaluate(opened, grey, sampels=3)


def test_statistics_are_those_of_the_command(tmp_path, cli, pixels, grey):
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    options = ["--features", "digits", "--store-features"]
    assert cli("stats", tmp_path / "images.npz", "--out", tmp_path / "by-command.npz", *options).code == 0
    naming.speak("python")
    found = diffkd.compute_statistics(
        pixels, features="digits", out=tmp_path / "by-python.npz", store_features=True, cache=False
    )
    one, two = (np.load(tmp_path / f"by-{name}.npz") for name in ("command", "python"))
    assert one.files == two.files
    for key in {*one.files} - {"protocol"}:
        np.testing.assert_array_equal(one[key], two[key])
    protocols = [json.loads(str(file["protocol"])) for file in (one, two)]
    assert protocols[1]["spec"] == {"kind": "memory"} and protocols[1]["sha256"] == protocols[0]["sha256"]
    fids = [
        diffkd.evaluate(grey, reference, "fid", features="digits")["fid"]
        for reference in (found, tmp_path / "by-command.npz", pixels)
    ]
    assert fids[0] == fids[1] == fids[2]
    with pytest.raises(UserError, match="out .*by-python.npz|exists already"):
        diffkd.compute_statistics(pixels, features="digits", out=tmp_path / "by-python.npz")
    with pytest.raises(UserError, match="statistics in memory holds no stored features"):
        diffkd.evaluate(grey, found, "kid", features="digits")
    with pytest.raises(UserError, match="store_features keeps features in a file; name it as out"):
        diffkd.compute_statistics(pixels, store_features=True)


def test_a_size_that_is_missing_is_called_what_it_is_in_python():
    with pytest.raises(UserError, match="needs a size: add resize$"):
        diffkd.evaluate(np.zeros((4, 8, 8, 1), np.uint8), "owner/images", features="digits")
