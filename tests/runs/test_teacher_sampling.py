"""A student far better than its teacher: console, report and card doubt how the teacher was drawn."""

from __future__ import annotations

import json
from html import unescape
from types import SimpleNamespace
from typing import Any

import pytest

from diffkd.core.samplers import SAMPLERS
from diffkd.methods.base import Stage
from diffkd.runs.artifacts import RunArtifacts
from diffkd.runs.reports import model_card, run_report
from diffkd.runs.reports.teacher_sampling import doubt

WORDS = "the teacher was drawn badly, by ddim in 100 steps"


def record(role: str, fid: Any, steps: int = 100, sampler: str = "ddim") -> dict[str, Any]:
    protocol = {
        "features": {"name": "inception"}, "samples": 500, "reference": {"name": "images"},
        "sampler": sampler,
    }  # fmt: skip
    model = "teacher" if role == "teacher" else f"{steps}-steps"
    return {"model": model, "role": role, "steps": steps, "nfe": steps, "fid": fid, "protocol": protocol}


RUINED = [record("teacher", 784.0), record("student", 141.0, 4)]


def test_it_names_the_other_samplers():
    said = doubt(RUINED[1], RUINED[0])
    assert WORDS in said and "diffkd evaluate TEACHER --sampler, one of heun, dpmpp_2m, ancestral)" in said
    by_ancestral = doubt(RUINED[1], record("teacher", 784.0, sampler="ancestral"))
    assert "one of ddim, heun, dpmpp_2m)" in by_ancestral and set(SAMPLERS) >= {"ddim", "heun", "dpmpp_2m"}


@pytest.mark.parametrize(
    "fids", [(0.9, 1.0), (0.5, 1.0), (2.0, 1.0), (None, 1.0), (1.0, None), (float("nan"), 9)]
)
def test_no_doubt_without_a_reason(fids):
    student, teacher = fids
    assert doubt(record("student", student), record("teacher", teacher)) == ""
    assert doubt(record("student", 1.0), None) == ""


def test_on_the_console():
    said: list[str] = []
    artifacts: Any = SimpleNamespace(
        session=SimpleNamespace(say=said.append, records=lambda: RUINED),
        _record=lambda name, steps: RUINED[1],
    )
    artifacts._teacher_best = lambda: RunArtifacts._teacher_best(artifacts)
    RunArtifacts.announce_stage(artifacts, Stage("4-steps", 20, 1e-3), 4)
    assert said[0] == "4-steps: 20 updates, FID 141.00 (0.18 of the teacher's best)"
    assert len(said) == 2 and WORDS in said[1]


def test_in_the_report(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(RUINED))
    page = run_report.write(tmp_path)
    assert page is not None and WORDS in unescape(page.read_text())


@pytest.mark.parametrize(
    ("more", "present", "absent"),
    [
        (
            {"teacher_measured": RUINED[0], "metrics": [RUINED[1]]},
            "best in 100 steps of ddim: FID 784.0",
            "zzz",
        ),
        ({"teacher_measured": RUINED[0], "metrics": [RUINED[1]]}, WORDS, "zzz"),
        ({"teacher_measured": RUINED[0], "metrics": [record("student", 700.0)]}, "FID 784.0", "drawn badly"),
        ({"teacher_measured": "<b>no record</b>"}, "A student", "<b>"),
        ({"teacher_measured": {"protocol": 3}}, "A student", "Its teacher"),
        ({"num_classes": 3, "classes": ["cat", "<b>dog</b>", "1"]}, "0 cat, 1 <b>dog</b>, 2 1.", "zzz"),
        ({"num_classes": 60, "classes": [f"c{i}" for i in range(60)]}, "49 c49, ... (60 in all, in", "c50"),
        ({"num_classes": None, "classes": ["cat"]}, "A student", "cat"),
        ({"classes": 7, "num_classes": 2}, "A student", "Class labels"),
        ({"teacher_sampler": "ddim", "sampler": "renoise"}, "| teacher sampler | ddim |", "zzz"),
    ],
)
def test_in_the_card(tmp_path, more, present, absent):
    model_card.write(tmp_path, {"steps": 4, "num_train_timesteps": 1000, **more})
    text = (tmp_path / "README.md").read_text()
    assert present in unescape(text) and absent not in text


def test_the_classes_of_a_classifier(tmp_path):
    network = {"name": "cnn", "arguments": {}}
    card = {"kind": "classifier", "schedule": None, "network": network, "shape": [1, 8, 8], "parameters": 9}
    model_card.write(tmp_path, {**card, "num_classes": 2, "classes": ["no", "yes"]})
    assert "Class labels and their names: 0 no, 1 yes." in (tmp_path / "README.md").read_text()
