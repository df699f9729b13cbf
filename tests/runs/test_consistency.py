"""Runs of consistency models: chains, and the students that one network is saved as."""

from __future__ import annotations

import json

import pytest

import diffkd
from diffkd.runs import session
from tests.runs.tiny import UNMEASURED, network, same, write

RUN = {
    **UNMEASURED, "out": "run", "data": {"kind": "digits"},
    "training": {"batch_size": 8, "log_every": 1, "ema": 0.5},
}  # fmt: skip


@pytest.fixture
def seen(monkeypatch):
    """(name of the stage, weights of the teacher, prediction of the teacher) of every stage trained."""
    found = []
    run_stage = session.run_stage

    def watched(accelerator, method, stage, nets, *rest, **options):
        weights = {key: value.clone() for key, value in nets["teacher"].network.state_dict().items()}
        found.append((stage.name, weights, nets["teacher"].prediction))
        run_stage(accelerator, method, stage, nets, *rest, **options)

    monkeypatch.setattr(session, "run_stage", watched)
    return found


def test_a_truncated_second_stage_learns_from_the_first(tmp_path, monkeypatch, cli, make_pipeline, seen):
    monkeypatch.chdir(tmp_path)
    methods = [
        {"name": "consistency", "steps": [4], "updates": 3, "learning_rate": 1e-2},
        {"name": "tcm", "steps": [2, 1], "updates": 3, "learning_rate": 1e-2},
    ]
    write("run.yaml", RUN, teacher={"path": str(make_pipeline(tmp_path))}, method=methods)
    code, _, err = cli("distill", "run.yaml")
    assert (code, err) == (0, "")
    students = tmp_path / "run/students"
    assert sorted(folder.name for folder in students.iterdir()) == ["1-steps", "2-steps", "4-steps"]
    assert [name for name, _, _ in seen] == ["4-steps", "1-steps"]
    assert same(seen[0][1], network(tmp_path / "pipeline")) and same(
        seen[1][1], network(students / "4-steps")
    )
    assert same(network(students / "2-steps"), network(students / "1-steps"))  # one network
    for steps in (4, 2, 1):
        card = json.loads((students / f"{steps}-steps/diffkd.json").read_text())
        index = json.loads((students / f"{steps}-steps/model_index.json").read_text())
        assert (card["steps"], card["sampler"]) == (steps, "renoise") and index["scheduler"][
            1
        ] == "LCMScheduler"
        assert diffkd.load(students / f"{steps}-steps").sampler == "renoise"


def test_an_epsilon_teacher_becomes_a_consistency_model_after_one_halving(
    tmp_path, monkeypatch, cli, make_pipeline, seen
):
    """The chain of configs/cifar10/ect.yaml."""
    monkeypatch.chdir(tmp_path)
    teacher = make_pipeline(tmp_path, prediction="epsilon", scheduler="linear")
    training = {"name": "consistency", "mode": "training", "steps": [2, 1], "updates": 3}
    write("run.yaml", RUN, teacher={"path": str(teacher)}, method=training)
    code, _, err = cli("distill", "run.yaml")
    assert code == 2 and "put method progressive before this one" in err
    write("run.yaml", RUN, teacher={"path": str(teacher)}, method=[
        {"name": "progressive", "steps": [500], "updates": 2, "updates_v": 2}, training,
    ])  # fmt: skip
    code, _, err = cli("distill", "run.yaml")
    assert (code, err) == (0, "")
    assert [(name, prediction) for name, _, prediction in seen] == [
        ("1000-steps", "epsilon"), ("500-steps", "v_prediction"), ("1-steps", "epsilon"),
    ]  # fmt: skip
    assert diffkd.load(tmp_path / "run/students/1-steps").prediction == "v_prediction"


def test_a_second_stage_without_a_first_is_refused(tmp_path, monkeypatch, cli, make_pipeline):
    monkeypatch.chdir(tmp_path)
    write("run.yaml", RUN, teacher={"path": str(make_pipeline(tmp_path))}, method={"name": "tcm"})
    code, _, err = cli("distill", "run.yaml")
    assert code == 2 and err.count("\n") == 1 and "put consistency, scm or lcm before it" in err
    assert not (tmp_path / "run").exists()
