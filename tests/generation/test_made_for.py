"""A student that is drawn otherwise than it was distilled for says so, in one line and once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from diffkd.core.schedules import Schedule
from diffkd.generation.generator import generate
from diffkd.models import loading
from diffkd.models.students.copies import with_network
from tests.tiny import student

CARD = {
    "steps": 2, "sampler": "ddim", "num_classes": 10, "null_label": 10, "num_train_timesteps": 1024,
    "guidance_baked_in": 2.0,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, make_pipeline):
    """A student of two steps with guidance of 2 baked in."""
    folder = make_pipeline(tmp_path, classes=11)
    (folder / "diffkd.json").write_text(json.dumps(CARD))
    return folder


@pytest.mark.parametrize(
    ("drawn", "said"),
    [
        ({}, None),
        ({"steps": 2, "sampler": "ddim", "guidance": 1.0}, None),
        ({"steps": 1}, "made for 2 steps of ddim, and is drawn in 1 step of ddim"),
        ({"steps": 8}, "made for 2 steps of ddim, and is drawn in 8 steps of ddim"),
        ({"sampler": "heun"}, "made for 2 steps of ddim, and is drawn in 2 steps of heun"),
        (
            {"guidance": 3.0},
            "made for 2 steps of ddim with guidance 2 baked in, and is drawn in 2 steps of ddim with "
            "guidance 3 on top",
        ),
        ({"guidance": 0.0}, "with guidance 0 on top"),
    ],
    ids=str,
)
def test_what_it_was_made_for(folder, drawn, said, caplog):
    denoiser = loading.load(folder)
    for _ in range(2):
        list(generate(denoiser, 2, **drawn))
    lines = [record.getMessage() for record in caplog.records if record.name == "diffkd"]
    assert len(lines) == (said is not None)
    assert said is None or (said in lines[0] and lines[0].startswith(f"{folder} was made for"))


def test_a_teacher_is_drawn_as_one_likes(caplog):
    teacher = student(6, "v_prediction", Schedule.cosine(64), steps=None)
    teacher.null_label, teacher.num_classes = 5, 5
    list(generate(teacher, 2, steps=4, sampler="heun", guidance=2.0))
    assert not caplog.records


def test_a_student_of_one_step_drawn_in_two(caplog):
    list(generate(student(None, "v_prediction", Schedule.cosine(64), steps=1), 2, steps=2))
    assert "the model was made for 1 step of ddim, and is drawn in 2 steps of ddim" in caplog.text


def test_a_copy_knows_its_guidance(folder):
    denoiser = loading.load(folder)
    assert with_network(denoiser, denoiser.network).guidance_baked_in == 2.0


def command(kind: str, folder: Any, tmp_path: Any) -> list[object]:
    how = ["--reference", "digits", "--samples", 8]
    if kind == "sample":
        return ["sample", folder, "-w", 3, "-n", 2, "--out", tmp_path / "o.npz"]
    if kind == "evaluate":
        return ["evaluate", folder, *how, "-w", 3]
    if kind == "evaluate stock":
        return ["evaluate", folder, *how, "--sampler", "stock", "--steps", 4]
    (tmp_path / "table.yaml").write_text(
        f"out: {tmp_path}/table\nmodels: [{{path: {folder}, steps: [2], guidance: 3}}]\n"
        "evaluation: {reference: digits, samples: 8, features: digits}\n"
    )
    return ["benchmark", tmp_path / "table.yaml"]


@pytest.mark.parametrize("kind", ["sample", "evaluate", "benchmark", "evaluate stock"])
def test_every_command_says_it_on_stderr(cli, folder, tmp_path, kind):
    code, _, err = cli(*command(kind, folder, tmp_path))
    said = [line for line in err.splitlines() if "was made for 2 steps" in line]
    assert code == 0 and len(said) == 1
    assert ("guidance 3 on top" in said[0]) == (kind != "evaluate stock")


def test_more_steps_than_the_table_has(cli, make_pipeline, tmp_path):
    folder = make_pipeline(tmp_path)
    code, _, err = cli("sample", folder, "--steps", 1_000_000, "-n", 1, "--out", tmp_path / "o.npz")
    assert code == 2 and "1000000 steps are more than the 1024 time steps of" in err
