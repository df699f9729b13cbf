"""Runs that learn from pairs, without images, and from the original teacher after another stage."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import diffkd
from diffkd.core import samplers
from diffkd.data import pairs as stored
from diffkd.data import shards
from diffkd.generation.labels import proportional
from diffkd.io.files import new_file
from diffkd.models import loading
from diffkd.runs import pairs, session
from tests.refusals import refuse
from tests.runs.tiny import CONFIG, UNMEASURED, assert_same_runs, network, same, signal_at, write

REGRESSION = {"name": "regression", "pairs": 40, "pair_steps": 2, "updates": 4, "guidance": 1.5}
HALVED = {"name": "progressive", "steps": [2], "updates": 3}


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_teacher) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stored, "IN_SHARD", 16)
    configure(tiny_teacher, method=REGRESSION)
    return tmp_path


def configure(teacher: Path, name: str = "distill.yaml", **more: Any) -> Path:
    content: dict[str, Any] = {**CONFIG, **UNMEASURED, "teacher": {"path": str(teacher)}, "out": "run"}
    return write(name, content | more)


@pytest.fixture
def teachers(monkeypatch) -> list[dict[str, Any]]:
    """The weights of teacher and student of every stage as it begins, and what it learns from."""
    seen: list[dict[str, Any]] = []
    real = session.run_stage

    def watched(accelerator: Any, method: Any, stage: Any, nets: Any, examples: Any, *rest: Any, **o: Any):
        weights = {
            n: {k: v.clone() for k, v in nets[n].network.state_dict().items()} for n in ("teacher", "student")
        }
        seen.append({"name": stage.name, "examples": examples, **weights})
        real(accelerator, method, stage, nets, examples, *rest, **o)

    monkeypatch.setattr(session, "run_stage", watched)
    return seen


# the original teacher


def test_a_stage_learns_from_the_original_teacher_and_starts_from_the_last_student(
    here, cli, tiny_teacher, teachers, monkeypatch
):
    opened = []
    real = loading.load
    monkeypatch.setattr(loading, "load", lambda path, **o: opened.append(str(path)) or real(path, **o))
    configure(tiny_teacher, method=[HALVED, REGRESSION])
    assert cli("distill", "distill.yaml").code == 0
    halved, regressed = teachers
    original, last = network(tiny_teacher), network(here / "run/students/2-steps")
    assert same(halved["teacher"], original) and same(regressed["teacher"], original)
    assert same(regressed["student"], last) and not same(last, original)
    assert opened.count(str(tiny_teacher)) == 2, "again only where a stage asks for it"


def test_a_stage_learns_from_a_student_by_its_name(here, cli, tiny_teacher, teachers):
    """A copy of the teacher that has seen more of the data teaches both kinds of stages after it."""
    tuned = {"name": "feature", "output": 0, "feature": 0, "updates": 3}
    matched = {"name": "dmd2", "updates": 2, "teacher": "feature"}
    config = configure(tiny_teacher, method=[tuned, HALVED, matched, {**REGRESSION, "teacher": "feature"}])
    assert cli("distill", "distill.yaml").code == 0
    copy = network(here / "run/students/feature")
    assert not same(copy, network(tiny_teacher))
    names = ["feature", "2-steps", "1-steps", "1-steps-regression"]
    assert [one["name"] for one in teachers] == names
    assert all(same(one["teacher"], copy) for one in teachers[1:])
    for before, one in zip(names, teachers[1:], strict=False):
        assert same(one["student"], network(here / "run/students" / before))
    assert (here / "run/pairs/feature/pairs.json").exists() and not (here / "run/pairs/teacher").exists()
    # a run that was ended in between goes on from the same ones
    before = network(here / "run/students/1-steps-regression")
    for name in names[2:]:
        shutil.rmtree(here / "run/students" / name)
    del teachers[:]
    assert cli("distill", config.name).code == 0
    assert [one["name"] for one in teachers] == names[2:]
    assert same(before, network(here / "run/students/1-steps-regression"))


def test_a_student_teaches_in_its_own_steps_only(here, cli, tiny_teacher):
    configure(tiny_teacher, method=[{**HALVED, "steps": [8]}, {**HALVED, "steps": [2]}])
    says = ["stage 2-steps", "knows its own 8 steps", "method.substeps", "method.teacher: original"]
    refuse(cli, here, "distill", "distill.yaml", says=says)
    configure(tiny_teacher, method=[{**HALVED, "steps": [8]}, {**HALVED, "steps": [2], "substeps": 4}])
    assert cli("distill", "distill.yaml").code == 0


# pairs


def test_pairs_are_what_the_teacher_draws_of_their_noise(here, cli, tiny_teacher, teachers):
    assert cli("distill", "distill.yaml").code == 0
    folder = here / "run/pairs/teacher"
    said = json.loads((folder / "pairs.json").read_text())
    assert (said["sampler"], said["steps"], said["guidance"]) == ("ddim", 2, 1.5)
    assert said["seed"] > 1 << 40, "far from the noise of images that are measured"
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    x0, labels = (torch.cat([shard[key] for shard in shards]) for key in ("x0", "labels"))
    assert len(x0) == 40 and torch.equal(labels, proportional(said["classes"], 40))
    teacher = diffkd.load(tiny_teacher)
    generators = [torch.Generator().manual_seed(said["seed"] + i) for i in range(40)]
    noise = samplers.randn((40, 1, 8, 8), generators, torch.empty(0))
    with torch.no_grad():
        expected = samplers.sample(teacher, noise, 2, class_labels=labels, guidance=1.5)
    assert torch.allclose(x0, expected, atol=1e-5)
    batch = teachers[0]["examples"].batch(8, torch.Generator().manual_seed(0))
    for image, noise_of in zip(batch[0], batch[2], strict=True):
        assert int((x0 - image).abs().flatten(1).max(1).values.argmin()) == int(
            (noise - noise_of).abs().flatten(1).max(1).values.argmin()
        )


def test_drawing_pairs_goes_on_where_it_stopped(here, cli, monkeypatch):
    """Stopped by a signal in the second shard of three: the first is kept, and all bits are the same."""
    assert cli("distill", "distill.yaml", "out=whole").code == 0
    calls = []
    real = pairs._images

    def drawn(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(pairs, "_images", drawn)
    assert cli("distill", "distill.yaml").code == 130
    assert [p.name for p in (here / "run/pairs/teacher").glob("*.safetensors")] == ["000000.safetensors"]
    assert cli("distill", "distill.yaml").code == 0
    assert len(calls) == 4
    assert_same_runs(here / "whole", here / "run")


def test_a_stage_of_pairs_stopped_and_resumed_ends_with_the_same_bits(here, cli, monkeypatch):
    assert cli("distill", "distill.yaml", "out=whole").code == 0
    with monkeypatch.context() as patch:
        signal_at(patch, "1-steps", 2, send=[signal.SIGTERM])
        assert cli("distill", "distill.yaml").code == 130
    monkeypatch.setattr(pairs, "_images", lambda *args: pytest.fail("drawn again"))
    assert cli("distill", "distill.yaml").code == 0
    assert_same_runs(here / "whole", here / "run")


def test_runs_share_pairs_and_refuse_those_of_others(here, cli, tiny_teacher, monkeypatch, make_pipeline):
    """In a folder that the config names: of another teacher, sampler, steps, guidance, seed or classes."""
    configure(tiny_teacher, method=REGRESSION, pairs="shared")
    assert cli("distill", "distill.yaml", "out=first").code == 0
    monkeypatch.setattr(pairs, "_images", lambda *args: pytest.fail("drawn again"))
    assert cli("distill", "distill.yaml", "out=second").code == 0
    assert not (here / "second/pairs").exists()
    other = make_pipeline(here, name="other", classes=11)
    card = json.loads((tiny_teacher / "diffkd.json").read_text())
    (other / "diffkd.json").write_text(json.dumps({k: card[k] for k in ("num_classes", "null_label")}))
    changes = {
        f"teacher={{path: {other}}}": "another teacher", "method.sampler=heun": "another sampler",
        "method.pair_steps=4": "another steps", "method.guidance=1": "another guidance",
        "seed=1": "another seed",
    }  # fmt: skip
    for change, says in changes.items():
        refuse(cli, here, "distill", "distill.yaml", "out=third", change, says=["pairs", says])


def test_a_full_disk_while_pairs_are_drawn(here, cli, monkeypatch):
    def full(path: Path) -> Any:
        if path.suffix == ".safetensors" and "pairs" in path.parts:
            raise OSError(28, "No space left on device", str(path))
        return new_file(path)

    monkeypatch.setattr(shards, "new_file", full)
    code, _, err = cli("distill", "distill.yaml")
    assert code == 1 and "the disk is full" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("method.sampler=ancestral", "adds noise of its own"),
        ("method.pair_steps=2000", "more than the teacher's 1024 time steps"),
    ],
)
def test_pairs_that_cannot_be_drawn(here, cli, change, says):
    refuse(cli, here, "distill", "distill.yaml", change, says=says)


def test_pairs_of_a_student_are_in_its_own_steps(here, cli, tiny_teacher):
    previous = {**REGRESSION, "teacher": "previous", "guidance": 1.0}
    configure(tiny_teacher, method=[{**HALVED, "steps": [4]}, previous])
    says = ["a student of 4 steps of ddim", "method.pair_steps"]
    refuse(cli, here, "distill", "distill.yaml", says=says)
    configure(tiny_teacher, method=[{**HALVED, "steps": [4]}, {**previous, "pair_steps": 4}])
    assert cli("distill", "distill.yaml").code == 0
    assert (here / "run/pairs/4-steps").is_dir() and not (here / "run/pairs/teacher").exists()


def test_two_stages_want_other_pairs_of_one_teacher(here, cli, tiny_teacher):
    reflow = {"name": "reflow", "steps": [4, 2], "pairs": 20, "pair_steps": 4, "guidance": 1.5}
    configure(tiny_teacher, method=[REGRESSION, reflow])
    refuse(cli, here, "distill", "distill.yaml", says="stage 4-steps wants pairs of teacher by other steps")


def test_reflow_from_images_to_students(here, cli, tiny_teacher, teachers):
    """The straight flow at 4 and 2 steps, and one step distilled from pairs of the flow itself."""
    reflow = {"name": "reflow", "steps": [4, 2, 1], "pairs": 20, "pair_steps": 3}
    configure(tiny_teacher, method={**reflow, "updates": 3, "distilling": 2})
    assert cli("distill", "distill.yaml").code == 0
    run = here / "run"
    assert {p.name for p in (run / "students").iterdir()} == {"4-steps", "2-steps", "1-steps"}
    assert {p.name for p in (run / "pairs").iterdir()} == {"teacher", "4-steps"}
    four, two = (network(run / "students" / name) for name in ("4-steps", "2-steps"))
    assert same(four, two) and same(teachers[1]["teacher"], four) and same(teachers[1]["student"], four)
    shared = ("distill", "distill.yaml", "out=again", "pairs=run/pairs", "method.learning_rate=1e-4")
    assert cli(*shared).code == 0  # the teacher's pairs are shared, a student's are its own run's
    assert [p.name for p in (here / "again/pairs").iterdir()] == ["4-steps"]


# without images

FREE = {"kind": "none"}


def test_a_run_without_images(here, cli, tiny_teacher, teachers):
    configure(tiny_teacher, method=REGRESSION, data={**FREE, "class_counts": [3, 1] + [0] * 8})
    code, out, err = cli("distill", "distill.yaml")
    assert (code, err) == (0, "") and "data: none; labels of 10 classes, drawn as 3, 1, 0" in out
    labels = load_file(here / "run/pairs/teacher/000000.safetensors")["labels"]
    assert torch.equal(labels, proportional([3, 1], 16))
    card = json.loads((here / "run/students/1-steps/diffkd.json").read_text())
    assert card["class_counts"] == [3, 1] + [0] * 8 and card["num_classes"] == 10


@pytest.mark.parametrize(
    ("method", "stages"),
    [
        ({"name": "dmd2", "updates": 2, "fake_updates": 2}, ["1-steps"]),
        ({"name": "sid", "updates": 2}, ["1-steps"]),
        (
            {"name": "reflow", "steps": [4, 1], "pairs": 20, "pair_steps": 2, "updates": 2, "distilling": 2},
            ["4-steps", "1-steps"],
        ),
    ],
    ids=["dmd2", "sid", "reflow"],
)
def test_methods_that_learn_from_the_teacher_alone_run_without_images(
    here, cli, tiny_teacher, teachers, method, stages
):
    """On labels of the classes that are asked for; what stands for the images would make any loss NaN."""
    data = {**FREE, "class_counts": [3, 1] + [0] * 8}
    configure(tiny_teacher, method=method, data=data, spread_every=None)
    assert cli("distill", "distill.yaml").code == 0
    assert [one["name"] for one in teachers] == stages
    for one in teachers:
        x0, cond, *_ = one["examples"].batch(64, torch.Generator().manual_seed(0))
        assert {*cond["class_labels"].tolist()} == {0, 1}
        assert x0.isnan().all() if method["name"] != "reflow" else x0.isfinite().all()
        made = network(here / "run/students" / one["name"])
        assert all(value.isfinite().all() for value in made.values()) and not same(made, one["student"])


def test_a_run_without_images_is_measured_against_its_reference(here, cli, tiny_teacher):
    evaluation = {"reference": "digits", "samples": 32, "teacher_steps": [2]}
    configure(tiny_teacher, method=REGRESSION, data=FREE, evaluation=evaluation)
    assert cli("distill", "distill.yaml").code == 0
    measured = json.loads((here / "run/metrics.json").read_text())
    assert [(r["role"], r["protocol"]["reference"]["name"]) for r in measured] == [
        ("teacher", "digits"), ("student", "digits"),
    ]  # fmt: skip


def test_a_run_from_what_the_teacher_draws(here, cli, tiny_teacher):
    data = {**FREE, "draws": 20, "steps": 2, "class_counts": [3, 1] + [0] * 8}
    configure(tiny_teacher, method=HALVED, data=data)
    code, out, err = cli("distill", "distill.yaml")
    assert (code, err) == (0, "") and "20 that the teacher draws in 2 steps" in out
    drawn = load_file(here / "run/pairs/data/000000.safetensors")
    assert torch.equal(drawn["labels"], proportional([3, 1], 16))
    again = cli("distill", "distill.yaml", "out=again", "pairs=run/pairs")
    assert again.code == 0 and same(*(network(here / out / "students/2-steps") for out in ("run", "again")))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": HALVED}, ["progressive learns from images", "data.draws", "regression"]),
        ({"data": {**FREE, "steps": 4}}, ["data.steps", "set data.draws"]),
        ({"method": {"name": "tcm"}, "data": {**FREE, "draws": 8}}, ["tcm", "learns what images are"]),
        ({"data": {"kind": "prompts", "path": "distill.yaml"}}, ["data kind prompts", "use kind none"]),
        ({"evaluation": {"samples": 32}}, "evaluation.reference is missing"),
        ({"data": {**FREE, "class_counts": [1, 2]}}, "which has 10 classes"),
        ({"student": {"kind": "narrow", "ratio": 0.5, "importance": "taylor"}}, "taylor needs images"),
    ],
)
def test_what_needs_images_is_refused_without(here, cli, tiny_teacher, change, says):
    configure(tiny_teacher, **{"method": REGRESSION, "data": FREE, **change})
    refuse(cli, here, "distill", "distill.yaml", says=says)


def test_a_teacher_is_not_trained_without_images(here, cli):
    write("teacher.yaml", {"out": "runs/teacher", "data": FREE})
    refuse(cli, here, "train", "teacher.yaml", says="data kind none has no images")
