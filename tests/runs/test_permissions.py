"""Every file that a command writes follows the umask: a group can share its runs."""

from __future__ import annotations

import os
import stat

import pytest
import yaml

from tests.runs.test_classification import CONFIG as CLASSIFIERS
from tests.runs.tiny import CONFIG, write

BENCHMARK = {
    "out": "bench", "models": [{"path": "run/students/1-steps"}],
    "evaluation": {"reference": "digits", "samples": 32, "labels": "balanced"},
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o007)
    yield tmp_path
    os.umask(before)


def check(folder, *, at_least):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {str(p): oct(stat.S_IMODE(p.stat().st_mode)) for p in files} == {str(p): "0o660" for p in files}
    folders = [path for path in folder.rglob("*") if path.is_dir()]
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in folders} <= {"0o770"}
    names = {path.name for path in files}
    assert names >= set(at_least), set(at_least) - names


def test_of_runs_images_statistics_and_records(here, cli, tiny_teacher):
    method = {**CONFIG["method"], "steps": [1], "updates": 2}
    write("distill.yaml", CONFIG, out="run", method=method, pictures=4, teacher={"path": str(tiny_teacher)})
    (here / "bench.yaml").write_text(yaml.safe_dump(BENCHMARK))
    for command in (
        ["distill", "distill.yaml"],
        ["sample", "run/students/1-steps", "-n", 4, "--out", "images"],
        ["sample", "run/students/1-steps", "-n", 4, "--out", "images.npz"],
        ["stats", "images", "--features", "digits", "--store-features", "--out", "ref.npz"],
        ["evaluate", "run/students/1-steps", "--reference", "digits", "--samples", 32, "--out", "r.json"],
        ["benchmark", "bench.yaml"],
    ):  # fmt: skip
        code, _, err = cli(*command)
        assert code == 0, (command, err)
    check(here, at_least=[
        "checkpoint.json", "student.safetensors", "ema.safetensors", "diffusion_pytorch_model.safetensors",
        "config.json", "model_index.json", "diffkd.json", "README.md", "config.yaml", "environment.json",
        "inputs.json", "log.jsonl", "metrics.json", "1-steps.png", "000003.png", "images-grid.png",
        "images.npz", "images.grid.png", "ref.npz", "r.json", "benchmark.md", "report.html",
    ])  # fmt: skip


@pytest.mark.slow
def test_of_classifiers(here, cli):
    (here / "c.yaml").write_text(yaml.safe_dump({**CLASSIFIERS, "repeats": 1}))
    assert cli("distill", "c.yaml").code == 0
    check(here, at_least=["model.safetensors", "classifier.md", "sweep.png", "report.html", "metrics.json"])
