"""The example of docs/text-to-image.md, run as it stands there, by configs of a tiny size."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import diffkd

ROOT = Path(__file__).parents[1]
SMALL = {
    "teacher": {
        "data.count": 64, "model.autoencoder.channels": [8, 8, 8], "model.autoencoder.norm_groups": 4,
        "model.text": {"width": 16, "heads": 2, "layers": 1},
        "model.unet": {"channels": [8, 16], "norm_groups": 4, "heads": 2},
        "autoencoding": {"updates": 3, "warmup": 0}, "denoising": {"updates": 3, "warmup": 0},
        "training.batch_size": 8, "evaluation.samples": 16, "evaluation.teacher_steps": [2], "pictures": 8,
    },
    "progressive": {
        "data.count": 64, "method.updates": 2, "method.substeps": 2, "training.batch_size": 8,
        "evaluation.samples": 16, "evaluation.teacher_steps": [2], "pictures": 8,
    },
}  # fmt: skip


def blocks(language: str) -> list[str]:
    """The fenced blocks of the example."""
    page = (ROOT / "docs" / "text-to-image.md").read_text(encoding="utf-8")
    section = page.split("## An example, from nothing\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the configs that the example names, smaller."""
    place = tmp_path / "configs" / "shapes"
    place.mkdir(parents=True)
    for name, changes in SMALL.items():
        content = yaml.safe_load((ROOT / "configs" / "shapes" / f"{name}.yaml").read_text())
        for key, value in changes.items():
            *outer, last = key.split(".")
            inner = content
            for part in outer:
                inner = inner[part]
            inner[last] = value
        (place / f"{name}.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_runs_as_it_is_written(cli, here, capsys):
    (commands,) = blocks("bash")
    called = []
    for line in commands.splitlines():
        program, *words = shlex.split(line, comments=True)
        assert program == "diffkd"
        outcome = cli(*words)
        assert outcome.code == 0, (line, outcome.stderr)
        called.append(words[0])
        if words[0] == "cache":  # of the teacher that was trained before
            assert "captions and images computed" in outcome.stdout
    assert called == ["train", "cache", "distill", "sample"]
    latents = here / "runs" / "shapes-teacher" / "cache" / "latents"
    assert len([*latents.iterdir()]) == 1, "the students' are those that their teacher was trained with"
    run = here / "runs" / "shapes-progressive"
    assert {folder.name for folder in (run / "students").iterdir()} == {f"{n}-steps" for n in (8, 4, 2, 1)}
    assert diffkd.load(run / "students" / "4-steps").guidance_baked_in == 1.75
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("<li") == 8 and "student prompt accuracy" in page
    assert len([*(here / "rings").glob("*.png")]) == 8
    # in stock, then in diffkd
    stock, ours = blocks("python")
    names: dict[str, Image.Image] = {}
    exec(stock, names)
    with Image.open(here / "rings" / "000000.png") as drawn:
        assert drawn.text["prompt"] == "a small red ring above a large blue square"
        difference = np.asarray(drawn).astype(int) - np.asarray(names["image"]).astype(int)
    assert difference.shape == (32, 32, 3) and np.abs(difference).max() <= 1
    capsys.readouterr()
    exec(ours, {})
    assert capsys.readouterr().out == "torch.Size([4, 32, 32, 3])\n"


def test_a_distillation_trains_the_teacher_that_is_not_there(cli, here):
    given = ("configs/shapes/progressive.yaml", "method.steps=[8]", "evaluation=null", "pictures=0")
    outcome = cli("distill", *given)
    assert outcome.code == 0, outcome.stderr
    assert diffkd.load(here / "runs" / "shapes-teacher" / "teacher").steps is None
    assert diffkd.load(here / "runs" / "shapes-progressive" / "students" / "8-steps").steps == 8


def test_what_is_computed_beforehand_needs_the_teacher(cli, here):
    outcome = cli("cache", "configs/shapes/progressive.yaml")
    assert outcome.code == 2 and "not there yet; run diffkd train" in outcome.stderr
    assert "configs/shapes/teacher.yaml first" in outcome.stderr
    without = ("data={kind: none}", "method={name: dmd2, steps: 1}", "evaluation=null")
    outcome = cli("cache", "configs/shapes/progressive.yaml", *without)
    assert outcome.code == 2 and "nothing to compute beforehand" in outcome.stderr
    assert not (here / "runs").exists()
