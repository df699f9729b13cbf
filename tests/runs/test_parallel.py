"""Training in several processes: the same students however it is divided, and no wait for a dead process."""

from __future__ import annotations

import importlib.util
import json
import subprocess

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.waiting import LAUNCHED, ONE_THREAD, wait_for

LAYOUTS = {  # processes x micro-batches of each: (processes, what each holds of the weights)
    "1x4": (1, "copies"), "2x2": (2, "copies"), "4x1": (4, "copies"),
    "fsdp-2x2": (2, "fsdp"), "fsdp-4x1": (4, "fsdp"),
}  # fmt: skip
WAYS = {  # the processes before a stop and after it, or of a run that nothing stops
    "whole": ["2x2"], "same": ["2x2", "2x2"], "2-1": ["2x2", "1x4"], "1-2": ["1x4", "2x2"],
    "whole-fsdp": ["fsdp-2x2"], "same-fsdp": ["fsdp-2x2", "fsdp-2x2"],
    "fsdp-1": ["fsdp-2x2", "1x4"], "1-fsdp": ["1x4", "fsdp-2x2"],
}  # fmt: skip
if importlib.util.find_spec("deepspeed"):
    LAYOUTS |= {"zero-2x2": (2, "deepspeed"), "zero-4x1": (4, "deepspeed")}
    WAYS |= {
        "whole-zero": ["zero-2x2"], "same-zero": ["zero-2x2", "zero-2x2"],
        "zero-1": ["zero-2x2", "1x4"], "fsdp-zero": ["fsdp-2x2", "zero-2x2"],
    }  # fmt: skip
NO_ZERO = [name for name in LAYOUTS if "zero" not in name]


def sample(method, *values):
    return pytest.param(method, *values, id=method)


def exhaustive(method, *values):
    return pytest.param(method, *values, marks=pytest.mark.exhaustive, id=f"{method}-exhaustive")


def train(launched, folder, layout, **options):
    """Run tests/parallel.py in the processes of that layout."""
    world, kind = LAYOUTS[layout]
    job = {"folder": str(folder), "world": world, "kind": kind, **options}
    done = launched(world, json.dumps(job), module="tests.parallel")
    assert done.returncode == 0, (job, done.stderr[-4000:])


def distance(one, two):
    """|a - b| / |a| over all weights of two files."""
    a, b = (torch.cat([w.double().flatten() for w in load_file(path).values()]) for path in (one, two))
    return ((a - b).norm() / a.norm()).item()


def same(one, two):
    a, b = load_file(one), load_file(two)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("method", "layouts", "updates"),
    [
        sample("two", ["1x4", "2x2", "fsdp-2x2"], 8),
        sample("feature", ["1x4", "2x2"], 8),
        sample("logits", ["1x4", "2x2"], 8),
        exhaustive("one", list(LAYOUTS), 25),
        exhaustive("two", NO_ZERO, 25),
        exhaustive("feature", ["1x4", "2x2", "fsdp-2x2"], 25),
        exhaustive("logits", ["1x4", "2x2", "fsdp-2x2"], 25),
    ],
)
def test_the_student_is_the_same_however_the_work_is_divided(tmp_path, launched, method, layouts, updates):
    """Four micro-batches in 1, 2 or 4 processes, copies or shards: the table of docs/reliability.md.

    What differs is the order in which four numbers are added, which Adam magnifies where a gradient is almost
    zero.
    """
    for name in layouts:
        train(launched, tmp_path / name, name, method=method, updates=updates)
    alone = log(tmp_path / "1x4")
    assert alone[-1]["update"] == updates and len(alone) == -(-updates // 7)
    for name in layouts:
        records = log(tmp_path / name)
        assert [r["update"] for r in records] == [r["update"] for r in alone]
        worst = {
            key: max(abs(mine[key] / theirs[key] - 1) for mine, theirs in zip(records, alone, strict=True))
            for key in ("learning_rate", "loss", "grad_norm", "gap")
            if key in alone[0]
        }
        weights = distance(tmp_path / "1x4/student.safetensors", tmp_path / name / "student.safetensors")
        print(f"{method} {name}: weights {weights:.1e}", *(f"{key} {worst[key]:.1e}" for key in worst))
        assert weights < 1e-6 and worst["learning_rate"] == 0
        assert max(worst["loss"], worst.get("gap", 0)) < 2e-6 and worst["grad_norm"] < 1e-5
        if method == "two" and LAYOUTS[name][1] == "copies":
            assert distance(tmp_path / "1x4/judge.safetensors", tmp_path / name / "judge.safetensors") < 1e-6


@pytest.mark.parametrize(
    ("method", "ways", "stop", "updates"),
    [
        sample("two", ["whole", "same", "2-1", "whole-fsdp", "same-fsdp"], 5, 8),
        exhaustive("one", list(WAYS), 12, 16),
        exhaustive("two", ["whole", "same", "2-1", "whole-fsdp", "same-fsdp", "fsdp-1"], 12, 16),
        exhaustive("feature", ["whole", "same", "2-1", "1-fsdp"], 12, 16),
        exhaustive("logits", ["whole", "same", "2-1", "1-fsdp"], 12, 16),
    ],
)
def test_a_stopped_run_resumes_in_any_number_of_processes(tmp_path, launched, method, ways, stop, updates):
    """One of its processes is asked to stop. The same processes then reach the same bits, others the same
    student but for rounding."""
    for name in ways:
        for part, layout in enumerate(WAYS[name]):
            stop_at = stop if len(WAYS[name]) == 2 and part == 0 else None
            train(launched, tmp_path / name, layout, method=method, updates=updates, stop_at=stop_at)
    student = {name: tmp_path / name / "student.safetensors" for name in ways}
    for kind in ("", "-fsdp", "-zero"):
        if f"same{kind}" in ways:
            assert same(student[f"whole{kind}"], student[f"same{kind}"]), kind
    whole = log(tmp_path / "whole")
    for name in ways:
        assert distance(student["whole"], student[name]) < 1e-6, name
        records = log(tmp_path / name)
        assert [r["update"] for r in records] == [*range(7, updates, 7), updates]
        assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in whole], rel=2e-6), name


def test_a_process_that_dies_takes_the_others_with_it(tmp_path, monkeypatch, make_pipeline, cli):
    """Sharded over two processes, one of which is killed: the other ends and says why, and the same command
    in one process reaches the same students."""
    monkeypatch.chdir(tmp_path)
    config = {
        "out": "runs/parts", "teacher": {"path": str(make_pipeline(tmp_path))}, "data": {"kind": "digits"},
        "method": {"name": "progressive", "steps": [4, 1], "updates": 20, "learning_rate": 1e-3},
        "training": {"batch_size": 16, "micro_batches": 2, "log_every": 1, "checkpoint_every": 5},
        "evaluation": None,
    }  # fmt: skip
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(config))
    assert cli("distill", "distill.yaml", "out=runs/whole").code == 0
    process = subprocess.Popen(
        [*LAUNCHED, "distill", "distill.yaml"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env={**ONE_THREAD, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    )  # fmt: skip
    wait_for(process, tmp_path / "runs/parts/log.jsonl", '"update": 1,')
    workers = psutil.Process(process.pid).children()
    ranks = {worker.environ()["RANK"]: worker for worker in workers if "RANK" in worker.environ()}
    assert sorted(ranks) == ["0", "1"]
    wait_for(process, tmp_path / "runs/parts/log.jsonl", '"1-steps", "stage_index": 1, "update": 7,')
    ranks["1"].kill()
    _, err = process.communicate(timeout=120)
    assert process.returncode
    assert not any(worker.is_running() for worker in workers)
    said = ("another process of this run is gone; its own error", "interrupted; the same command resumes it")
    first = "exitcode  : -15"  # the launcher ended it before it noticed
    assert any(words in err for words in (*said, first)), err
    assert "Signal 9 (SIGKILL) received" in err
    assert not (tmp_path / "runs/parts/students/1-steps").exists()
    assert cli("distill", "distill.yaml").code == 0
    for name in ("4-steps", "1-steps"):
        whole, parts = (
            load_file(tmp_path / f"runs/{run}/students/{name}/unet/diffusion_pytorch_model.safetensors")
            for run in ("whole", "parts")
        )
        assert whole.keys() == parts.keys()
        assert max((whole[key] - parts[key]).abs().max().item() for key in whole) < 1e-4
