"""Runs of consistency models: chains, and the students that one network is saved as."""

from __future__ import annotations

import json
from html import unescape

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


def test_an_epsilon_teacher_becomes_a_consistency_model_once_it_predicts_v(
    tmp_path, monkeypatch, cli, make_pipeline, seen
):
    """The remedy that every method names. What each student was guided with is on its card."""
    monkeypatch.chdir(tmp_path)
    teacher = make_pipeline(tmp_path, prediction="epsilon", scheduler="linear", classes=11)
    source = {"path": str(teacher), "null_label": 10}
    chain = [
        {
            "name": "output", "prediction": "v_prediction", "guidance": 1.5, "updates": 2,
            "learning_rate": 1e-2,
        },
        {"name": "consistency", "teacher": "previous", "steps": [2], "updates": 2, "learning_rate": 1e-2},
        {"name": "dmd2", "updates": 2, "learning_rate": 1e-2},
    ]  # fmt: skip
    write("run.yaml", RUN, teacher=source, method=chain[1:])
    code, _, err = cli("distill", "run.yaml")
    assert code == 2 and err.count("\n") == 1
    assert "put {name: output, prediction: v_prediction} before this method" in err
    write("run.yaml", RUN, teacher=source, method=chain)
    code, _, err = cli("distill", "run.yaml")
    assert (code, err) == (0, "")
    students = tmp_path / "run/students"
    assert [(name, prediction) for name, _, prediction in seen] == [
        ("output", "epsilon"), ("2-steps", "v_prediction"), ("1-steps", "epsilon"),
    ]  # fmt: skip
    assert same(seen[1][1], network(students / "output")) and same(seen[2][1], network(teacher))
    made = {name: diffkd.load(students / name) for name in ("output", "2-steps", "1-steps")}
    assert {student.prediction for student in made.values()} == {"v_prediction"}
    assert [student.steps for student in made.values()] == [None, 2, 1]
    assert [student.guidance_baked_in for student in made.values()] == [1.5, 1.5, 1.0]
    cards = [json.loads((students / name / "diffkd.json").read_text()) for name in made]
    assert [card.get("teacher_sampler") for card in cards] == [None, "ddim", None]
    assert "| guidance baked in | 1.5 |" in unescape((students / "2-steps/README.md").read_text())


def test_a_second_stage_without_a_first_is_refused(tmp_path, monkeypatch, cli, make_pipeline):
    monkeypatch.chdir(tmp_path)
    write("run.yaml", RUN, teacher={"path": str(make_pipeline(tmp_path))}, method={"name": "tcm"})
    code, _, err = cli("distill", "run.yaml")
    assert code == 2 and err.count("\n") == 1 and "put consistency, scm or lcm before it" in err
    assert not (tmp_path / "run").exists()
