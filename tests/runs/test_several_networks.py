"""Runs of methods with several networks, killed amid the losses of one update."""

from __future__ import annotations

import signal

import pytest

from tests.runs.tiny import UNMEASURED, assert_same_runs, log, write

RUN = {
    **UNMEASURED, "data": {"kind": "digits"}, "spread_every": None,
    "training": {"batch_size": 8, "micro_batches": 2, "log_every": 1, "checkpoint_every": 2},
}  # fmt: skip
METHODS = {  # the last has one loss, and pairs that it is made of before
    "dmd2": {"steps": 1, "fake_updates": 2, "gan": 0.1, "r1": 1.0},
    "adversarial": {"steps": 1, "r1": 1.0},
    "scm": {"steps": [1]},
    "lcm": {"steps": [1], "target_decay": 0.5},
    "regression": {"pairs": 24, "pair_steps": 2},
}


@pytest.mark.parametrize(
    "name", ["dmd2", *(pytest.param(name, marks=pytest.mark.slow) for name in [*METHODS][1:])]
)
def test_a_run_killed_amid_an_update_ends_with_the_same_bits(
    tmp_path, monkeypatch, cli, launched, make_pipeline, name
):
    """The student has been updated, and its fake network, heads, weight or target has not. How the networks
    compare is in the log and on the page."""
    monkeypatch.chdir(tmp_path)
    method = {"name": name, "updates": 4, "learning_rate": 1e-3, "warmup": 0, **METHODS[name]}
    write("run.yaml", RUN, teacher={"path": str(make_pipeline(tmp_path))}, method=method)
    assert cli("distill", "run.yaml", "out=whole").code == 0
    records, page = log(tmp_path / "whole"), (tmp_path / "whole/report.html").read_text()
    judged = {"dmd2", "adversarial"}
    assert (name in judged) == all(0 <= r.get("heads_accuracy", -1) <= 1 for r in records)
    assert (name in judged) == ("Accuracy of the discriminator" in page)
    assert (name in judged | {"scm"}) == ("Ratios of gradient norms" in page)
    strike = ("1-steps", "3+", int(signal.SIGKILL))
    done = launched(1, *strike, "distill", "run.yaml", "out=run", module="tests.runs.killed")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert log(tmp_path / "run")[-1]["update"] == 3  # the last checkpoint is an update older
    assert cli("distill", "run.yaml", "out=run").code == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "run")
