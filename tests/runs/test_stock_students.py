"""Students of whole runs, drawn by stock code from the same noise: the pixels of `diffkd sample`."""

from __future__ import annotations

import numpy as np
import pytest

import diffkd
from tests.runs.tiny import UNMEASURED, network, same, write
from tests.stock import stock_pictures

METHODS = {  # one for each way of drawing; each leaves a student of 4 steps, of 2 and of 1
    "ddim": {"name": "progressive", "updates": 2},
    "renoise": {"name": "consistency", "updates": 3, "warmup": 0},
    "euler": {"name": "meanflow", "updates": 3, "warmup": 0},  # along the flow, which is a step of DDIM
}


@pytest.mark.slow
@pytest.mark.parametrize("conditional", [False, True], ids=["unconditional", "conditional"])
@pytest.mark.parametrize("drawn", METHODS)
def test_a_trained_student_draws_the_same_pixels_without_diffkd(
    tmp_path, monkeypatch, make_pipeline, cli, drawn, conditional
):
    monkeypatch.chdir(tmp_path)
    teacher = make_pipeline(tmp_path, classes=11 if conditional else None)
    source, method = {"path": str(teacher)}, {**METHODS[drawn], "steps": [4, 2, 1], "learning_rate": 1e-2}
    if conditional:
        source["null_label"], method["guidance"] = 10, 1.5
    run = {"out": "run", "data": {"kind": "digits"}, "training": {"batch_size": 8, "ema": 0.5}, **UNMEASURED}
    write("run.yaml", run, teacher=source, method=method)
    assert cli("distill", "run.yaml").code == 0
    students = [(tmp_path / f"run/students/{steps}-steps", steps) for steps in (4, 2, 1)]
    n, labels = 24, [i % 10 for i in range(24)] if conditional else None
    found = []
    for (folder, steps), stock in zip(students, stock_pictures(students, tmp_path, n, labels), strict=True):
        out = f"{steps}.npz"
        options = ["-n", n, "--seed", 5, "--batch-size", n, "--device", "cpu", "--out", out]
        code, _, err = cli("sample", folder, *options)
        assert (code, err) == (0, "")  # of its own steps, by its own sampler
        ours = np.load(out)["arr_0"]
        assert np.array_equal(ours, stock["pictures"]), np.abs(ours - stock["floats"] * 255).max()
        assert ours.std() > 10 and ours.shape == (n, 8, 8, 1)
        usual = "DDPMPipeline" if drawn == "renoise" else "DDIMPipeline"
        assert stock["kind"] == ("ConsistencyModelPipeline" if conditional else usual)
        assert stock["scheduler"] == ("LCMScheduler" if drawn == "renoise" else "DDIMScheduler")
        assert not same(network(folder), network(teacher))
        student = diffkd.load(folder)
        assert (student.steps, student.num_classes) == (steps, 10 if conditional else None)
        found.append(ours)
    assert not any(np.array_equal(a, b) for a, b in zip(found, found[1:], strict=False))
