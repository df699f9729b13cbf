"""The examples of latent teachers from nothing in configs/: a few updates of every stage, then the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import diffkd

ROOT = Path(__file__).parents[2]
TINY = {"width": 16, "layers": 2, "heads": 2}
TEACHER = {
    "autoencoding.updates": 2, "denoising.updates": 2, "model.autoencoder.channels": [8, 8],
    "training.batch_size": 4, "evaluation": None, "pictures": 0,
}  # fmt: skip
FEW = {"training.batch_size": 4, "evaluation": None, "pictures": 0, "spread_every": None}
EXAMPLES = {  # what is smaller of the teacher, and of its students' runs
    "digits/dit": ({"model.transformer": {**TINY, "patch": 1}}, {}),
    "shapes/flow": (
        {"model.transformer": {**TINY, "patch": 4}, "model.text": TINY, "data.count": 16}, {"data.count": 16},
    ),
}  # fmt: skip


def given(changes):
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def few_updates(methods):
    """As the config has them, with two updates of every stage."""
    methods = methods if isinstance(methods, list) else [methods]
    return [{**method, "updates": 2, "warmup": 0, "learning_rate": 1e-3} for method in methods]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(cli, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    of_teacher, of_students = EXAMPLES[name]
    folder, stem = (ROOT / "configs" / name).parent, Path(name).name
    outcome = cli("train", folder / f"{stem}-teacher.yaml", *given({**TEACHER, **of_teacher}))
    assert outcome.code == 0, outcome.stderr
    (teacher,) = Path("runs").iterdir()
    every = [path for path in folder.glob(f"{stem}*.yaml") if not path.stem.endswith("teacher")]
    contents = {path: yaml.safe_load(path.read_text()) for path in sorted(every)}
    table = contents.pop(folder / f"{stem}-benchmark.yaml")
    assert len(contents) >= 3
    for path, content in contents.items():
        assert content["cache"] == f"{teacher}/cache"
        assert content["teacher"]["train"] == f"{stem}-teacher.yaml"
        method = {"method": few_updates(content["method"]), "teacher": {"path": f"{teacher}/teacher"}}
        outcome = cli("distill", path, *given({**FEW, **of_students, **method}))
        assert outcome.code == 0, outcome.stderr
    # every row of the table is there, its steps those that its student is made for, and no run is left out
    for entry in table["models"]:
        assert diffkd.load(entry["path"]).steps in (None, *entry["steps"])
    measured = {str(Path(entry["path"]).parents[1]) for entry in table["models"]}
    assert measured >= {content["out"] for content in contents.values()}
