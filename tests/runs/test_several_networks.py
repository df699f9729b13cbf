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
    "f_distill": {"steps": 1, "fake_updates": 2},
    "sid": {"steps": 1, "fake_updates": 2},
    "adversarial": {"steps": 1, "r1": 1.0},
    "scm": {"steps": [1]},
    "tcm": {"steps": [1], "mode": "distillation"},
    "lcm": {"steps": [1], "target_decay": 0.5},
    "shortcut": {"steps": [1], "target_decay": 0.5},
    "regression": {"pairs": 24, "pair_steps": 2},
}
BEFORE = {"tcm": {"name": "consistency", "steps": [2], "updates": 1}}  # what it goes on from


@pytest.mark.parametrize(
    "name", ["dmd2", *(pytest.param(name, marks=pytest.mark.slow) for name in [*METHODS][1:])]
)
def test_a_run_killed_amid_an_update_ends_with_the_same_bits(
    tmp_path, monkeypatch, cli, launched, make_pipeline, name
):
    """The student has been updated, and its fake network, heads, weight or target has not; what the frozen
    first stage of tcm is, is the student before that. How the networks compare is in the log and on the
    page."""
    monkeypatch.chdir(tmp_path)
    method = {"name": name, "updates": 4, "learning_rate": 1e-3, "warmup": 0, **METHODS[name]}
    chain = [BEFORE[name], method] if name in BEFORE else method
    write("run.yaml", RUN, teacher={"path": str(make_pipeline(tmp_path))}, method=chain)
    assert cli("distill", "run.yaml", "out=whole").code == 0
    records, page = log(tmp_path / "whole"), (tmp_path / "whole/report.html").read_text()
    judged = {"dmd2", "f_distill", "adversarial"}
    assert (name in judged) == all(0 <= r.get("heads_accuracy", -1) <= 1 for r in records)
    assert (name in judged) == ("Accuracy of the discriminator" in page)
    assert (name in judged | {"sid", "scm"}) == ("Ratios of gradient norms" in page)
    strike = ("1-steps", "3+", int(signal.SIGKILL))
    done = launched(1, *strike, "distill", "run.yaml", "out=run", module="tests.runs.killed")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert log(tmp_path / "run")[-1]["update"] == 3  # the last checkpoint is an update older
    assert cli("distill", "run.yaml", "out=run").code == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "run")


def test_a_fake_network_that_leaves_the_finite_numbers_stops_the_run(
    tmp_path, monkeypatch, cli, make_pipeline
):
    """Its first update takes its weights out of range, so the student has no finite direction afterwards."""
    monkeypatch.chdir(tmp_path)
    method = {"name": "dmd2", "updates": 8, "warmup": 0, "fake_updates": 1, "fake_learning_rate": 1e30}
    write("run.yaml", RUN, teacher={"path": str(make_pipeline(tmp_path))}, method=method)
    code, _, err = cli("distill", "run.yaml", "out=run")
    assert code == 2 and len(err.splitlines()) == 1, err
    assert "network student in stage 1-steps became NaN or infinite at update 5" in err
    assert "3 updates in a row were skipped before (training.max_skipped): lower method.learning_rate" in err
    skipped = [record["update"] for record in log(tmp_path / "run") if record.get("event") == "skipped"]
    assert skipped == [2, 3, 4, 5]
