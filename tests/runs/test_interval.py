"""A run whose student takes its step's length while it trains: one stock student for each step count."""

from __future__ import annotations

import copy
import json
import signal

import pytest
import torch
from diffusers import DiffusionPipeline

import diffkd
from diffkd.core import adapters, interval
from diffkd.runs import session
from diffkd.runs.artifacts import RunArtifacts
from tests.runs.tiny import UNMEASURED, assert_same_runs, network, records, same, signal_at, write

CONFIG = {
    "out": "run", "data": {"kind": "digits"}, "pictures": 4,
    "method": [
        {"name": "meanflow", "steps": [4, 2], "updates": 6, "learning_rate": 1e-2, "warmup": 0},
        {"name": "progressive", "steps": [1], "updates": 2},
    ],
    "training": {"batch_size": 8, "log_every": 1, "checkpoint_every": 4, "ema": 0.5},
    "evaluation": {"samples": 8, "teacher_steps": [8]},
}  # fmt: skip
BIAS = "time_embedding.linear_2.bias"
LORA = "student={kind: lora, rank: 2}"


@pytest.fixture
def here(tmp_path, monkeypatch, make_pipeline):
    monkeypatch.chdir(tmp_path)
    write("run.yaml", CONFIG, teacher={"path": str(make_pipeline(tmp_path))})
    return tmp_path


@pytest.mark.parametrize("changes", [(), (LORA,)], ids=["copy", "lora"])
def test_one_training_leaves_a_stock_student_of_each_step_count(here, cli, monkeypatch, changes):
    """Also as an adapter, which is merged with its base; the next stage's is on what this makes."""
    trained, starts = [], []
    run_stage = session.run_stage

    def watched(accelerator, method, stage, nets, *rest, **options):
        starts.append({key: value.clone() for key, value in nets["student"].network.state_dict().items()})
        run_stage(accelerator, method, stage, nets, *rest, **options)
        trained.append(copy.deepcopy(nets["student"]))

    monkeypatch.setattr(session, "run_stage", watched)
    code, out, err = cli("distill", "run.yaml", *changes)
    assert out.count("saved merged, as it learned with one more number as an input") == len(changes)
    assert (code, err) == (0, "") and "students: 4-steps and 2-steps (meanflow, 6), 1-steps" in out
    students = here / "run/students"
    assert sorted(folder.name for folder in students.iterdir()) == ["1-steps", "2-steps", "4-steps"]
    assert [r["steps"] for r in records(here / "run") if r["role"] == "student"] == [4, 2, 1]
    assert {path.stem for path in (here / "run/samples").iterdir()} >= {"4-steps", "2-steps", "1-steps"}

    # they differ in what the length became, and draw what the network did that was given it
    four, two = network(students / "4-steps"), network(students / "2-steps")
    stock = network(here / "pipeline")
    assert four.keys() == two.keys() == stock.keys()
    assert {key for key in four if not torch.equal(four[key], two[key])} == {BIAS}
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, whole = torch.tensor([0.25, 0.5, 1.0]).double(), trained[0].eval()
    assert interval.attached(whole.network) is not None
    for n in (4, 2):
        card = json.loads((students / f"{n}-steps/diffkd.json").read_text())
        assert (card["steps"], card["stage"], card["sampler"]) == (n, "2-steps", "ddim")
        student = diffkd.load(students / f"{n}-steps")
        with torch.no_grad():
            expected = whole(x, t, interval=torch.full((3,), 1 / n, dtype=torch.float64))
            assert torch.allclose(student(x, t), expected, atol=1e-5), n
        # without diffkd
        pipeline = DiffusionPipeline.from_pretrained(students / f"{n}-steps")
        pipeline.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        drawn = pipeline(3, generators, num_inference_steps=n, output_type="np").images
        (ours,) = diffkd.generate(student, 3, steps=n, seed=0)
        assert (torch.from_numpy(drawn) * 255).round().to(torch.uint8).equal(ours.cpu())

    # the chain goes on from the last of them
    weights = {key: value for key, value in starts[1].items() if not adapters.is_factor(key)}
    assert same({key.replace(".base_layer.", "."): value for key, value in weights.items()}, two)
    assert (len(weights) < len(starts[1])) == bool(changes)
    card = json.loads((students / "1-steps/diffkd.json").read_text())
    assert card.get("lora", {}).get("base") == (str(students / "2-steps") if changes else None)


@pytest.mark.parametrize(
    ("where", "changes"),
    [
        ("training", ()),
        ("export", ()),
        ("training", (LORA,)),
        ("export", (LORA, "training.precision=bf16")),
    ],
)
def test_a_stopped_run_ends_with_the_same_bits(here, cli, monkeypatch, where, changes):
    """In an update, and between the exports of two students of one stage; with a base that was rounded."""
    shorter = [*changes, *(f"{key}={json.dumps(value)}" for key, value in UNMEASURED.items())]
    assert cli("distill", "run.yaml", "out=whole", *shorter).code == 0
    with monkeypatch.context() as patch:
        if where == "training":
            signal_at(patch, "2-steps", 2, send=[signal.SIGTERM])
        else:
            export = RunArtifacts.export

            def stopping(self, denoiser, folder, **card):
                if folder.name == "2-steps":
                    signal.raise_signal(signal.SIGINT)
                    signal.raise_signal(signal.SIGINT)
                export(self, denoiser, folder, **card)

            patch.setattr(RunArtifacts, "export", stopping)
        assert cli("distill", "run.yaml", "out=run", *shorter).code == 130
    assert (here / "run/students/4-steps").exists() == (where == "export")
    assert not (here / "run/students/2-steps").exists()
    assert cli("distill", "run.yaml", "out=run", *shorter).code == 0
    assert_same_runs(here / "whole", here / "run")


def test_names_and_step_counts_of_all_students_are_checked_before_anything_is_trained(here, cli):
    for method, said in (
        ("{name: meanflow, steps: [2, 2]}", "method meanflow has two students of the same number of steps"),
        ("{name: meanflow, steps: [3, 1]}", "a student of 3 steps does not fit a teacher of 1024"),
    ):
        code, _, err = cli("distill", "run.yaml", f"method={method}")
        assert code == 2 and said in err.splitlines()[-1]
    assert not (here / "run").exists()
