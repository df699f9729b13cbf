"""scripts/slurm.sbatch on two nodes that are one machine: one run, requeued when its time is up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs.conftest import STOPPED
from tests.runs.tiny import assert_same_runs, write
from tests.waiting import ONE_THREAD

ROOT = Path(__file__).parents[2]
FAKES = {
    "srun": """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 9
shift
tasks=() status=0
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit $status
""",
    "scontrol": """#!/bin/bash
[ "$1" = show ] && echo 127.0.0.1 && echo another
[ "$1" = requeue ] && echo "$2" >> "$REQUEUED"
""",
}


@pytest.mark.slow
def test_two_nodes_are_one_run_and_go_on_after_their_time(tmp_path, tiny_teacher, launched, monkeypatch):
    """Each has a launcher of its own; the students are those of two processes of one, to the bit."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    for name, text in FAKES.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    write("run.yaml", STOPPED, teacher={"path": str(tiny_teacher)}, out=str(tmp_path / "whole"))
    assert launched(2, "distill", "run.yaml").returncode == 0
    places = [tmp_path / "bin", Path(sys.executable).parent, os.environ["PATH"]]
    environment = {
        **ONE_THREAD, "PATH": ":".join(map(str, places)), "PYTHONPATH": str(ROOT),
        "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": str(os.getpid()), "STOP_AFTER": "1s",
        "REQUEUED": str(tmp_path / "requeued"),
    }  # fmt: skip
    command = ["bash", ROOT / "scripts/slurm.sbatch", tmp_path / "run.yaml", f"out={tmp_path / 'nodes'}"]

    def job(**changed):
        done = subprocess.run(
            command, cwd=ROOT, env={**environment, **changed}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-4000:]

    job()
    requeued = tmp_path / "requeued"
    assert requeued.read_text().split() == [environment["SLURM_JOB_ID"]]
    assert not (tmp_path / "nodes/students/1-steps").exists()
    job(STOP_AFTER="1h")
    assert len(requeued.read_text().split()) == 1
    assert_same_runs(tmp_path / "whole", tmp_path / "nodes")
