"""Training in several processes: the same students however it is divided, and no wait for a dead process."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess

import psutil
import pytest
import torch
import yaml
from accelerate.utils import is_torch_version
from safetensors.torch import load_file

from diffkd.training.launch import FSDP_ON_CPU
from tests.methods.variants import VARIANTS
from tests.waiting import LAUNCHED, ONE_THREAD, wait_for

LAYOUTS = {  # processes x micro-batches of each: (processes, what each holds of the weights)
    "1x4": (1, "copies"), "2x2": (2, "copies"), "4x1": (4, "copies"),
    "fsdp-2x2": (2, "fsdp"), "fsdp-4x1": (4, "fsdp"),
}  # fmt: skip
WAYS = [  # the layouts before a stop and after it
    ("2x2", "2x2"), ("2x2", "1x4"), ("1x4", "2x2"),
    ("fsdp-2x2", "fsdp-2x2"), ("fsdp-2x2", "1x4"), ("1x4", "fsdp-2x2"),
]  # fmt: skip
if importlib.util.find_spec("deepspeed"):
    LAYOUTS |= {"zero-2x2": (2, "deepspeed"), "zero-4x1": (4, "deepspeed")}
    WAYS += [("zero-2x2", "zero-2x2"), ("zero-2x2", "1x4"), ("fsdp-2x2", "zero-2x2")]
SEVERAL = [*VARIANTS, "scm", "meanflow", "lcm", "sid", "f_distill"]  # networks, or a derivative of one
ENLARGED = {  # rounding: of a difference over its step, of weights of heads that change nothing
    "scm-jvp": 10, "adversarial-r1": 10,
}  # fmt: skip
SHARDS_ON_CPU = is_torch_version(">=", FSDP_ON_CPU)
NO_ZERO = [name for name in LAYOUTS if "zero" not in name]


def sample(method, *values):
    return pytest.param(method, *values, id=method)


def slow(method, *values):
    return pytest.param(method, *values, marks=pytest.mark.slow, id=method)


def exhaustive(method, *values):
    return pytest.param(method, *values, marks=pytest.mark.exhaustive, id=f"{method}-exhaustive")


def train(launched, folder, layout, **options):
    """Run tests/parallel.py in the processes of that layout."""
    world, kind = LAYOUTS[layout]
    if kind == "fsdp" and not SHARDS_ON_CPU:
        pytest.skip(f"FSDP2 on CPUs needs torch {FSDP_ON_CPU}")
    job = {"folder": str(folder), "world": world, "kind": kind, **options}
    done = launched(world, json.dumps(job), module="tests.parallel")
    assert done.returncode == 0, (job, done.stderr[-4000:])


@pytest.fixture
def trained(launched, built_once):
    """trained(layout, method, updates, stop_at=None) -> the folder of such a run, made once."""

    def get(layout, method, updates, stop_at=None):
        options = {"method": method, "updates": updates, "stop_at": stop_at}
        name = f"{method}-{layout}-{stop_at or updates}-of-{updates}"
        return built_once(name, lambda folder: train(launched, folder, layout, **options))

    return get


def distance(one, two):
    """|a - b| / |a| over all weights of two files."""
    a, b = (torch.cat([w.double().flatten() for w in load_file(path).values()]) for path in (one, two))
    return ((a - b).norm() / a.norm()).item()


def networks(folder):
    return {path.stem for path in folder.glob("*.safetensors")}


def same(one, two):
    a, b = load_file(one), load_file(two)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("method", "layouts", "updates"),
    [
        sample("two", ["2x2", "fsdp-2x2"], 8),
        sample("feature", ["2x2"], 8),
        sample("logits", ["2x2"], 8),
        sample("sd", ["fsdp-2x2"], 8),
        sample("xl", ["fsdp-2x2"], 8),
        slow("lora", ["2x2"], 8),
        slow("lora-dmd2", ["2x2"], 8),
        slow("lora-shortcut", ["2x2"], 8),
        *(slow(method, ["2x2", "fsdp-2x2"], 8) for method in SEVERAL),
        exhaustive("one", list(LAYOUTS), 16),
        exhaustive("two", [name for name in LAYOUTS if "zero" not in name], 16),
        exhaustive("feature", ["2x2", "fsdp-2x2"], 16),
        exhaustive("logits", ["2x2", "fsdp-2x2"], 16),
    ],
)
def test_the_student_is_the_same_however_the_work_is_divided(trained, method, layouts, updates):
    """Four micro-batches in 1, 2 or 4 processes, copies or shards: the table of docs/reliability.md.

    What differs is the order in which four numbers are added, which Adam magnifies where a gradient is almost
    zero.
    """
    alone = trained("1x4", method, updates)
    expected = log(alone)
    assert expected[-1]["update"] == updates and len(expected) == -(-updates // 7)
    for layout in layouts:
        folder = trained(layout, method, updates)
        records = log(folder)
        assert [r["update"] for r in records] == [r["update"] for r in expected]
        worst = {
            key: max(abs(mine[key] / theirs[key] - 1) for mine, theirs in zip(records, expected, strict=True))
            for key in ("learning_rate", "loss", "grad_norm", "gap")
            if key in expected[0]
        }
        weights = distance(alone / "student.safetensors", folder / "student.safetensors")
        print(f"{method} {layout}: weights {weights:.1e}", *(f"{key} {worst[key]:.1e}" for key in worst))
        assert weights < 1e-6 and worst["learning_rate"] == 0
        enlarged = ENLARGED.get(method, 1)
        assert max(worst["loss"], worst.get("gap", 0)) < 2e-6 * enlarged
        assert worst["grad_norm"] < 1e-5 * enlarged
        for other in networks(alone) - {"student"}:  # "two" ends with the average of its second one
            assert distance(alone / f"{other}.safetensors", folder / f"{other}.safetensors") < 2e-6 * enlarged


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["2x2", "fsdp-2x2"])
def test_half_precision_is_the_same_in_shards(tmp_path, launched, layout):
    """In one update: Adam magnifies the rounding of its gradients in the next. Autocast alone rounds, and not
    what a network is called with, such as its times."""
    for name in ("1x4", layout):
        train(launched, tmp_path / name, name, method="one", updates=1, training={"precision": "bf16"})
    (alone,), (parts,) = (log(tmp_path / name) for name in ("1x4", layout))
    assert parts["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert parts["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("method", "ways", "stop", "updates"),
    [
        sample("two", [("2x2", "2x2"), ("2x2", "1x4"), ("fsdp-2x2", "fsdp-2x2")], 5, 8),
        sample("xl", [("fsdp-2x2", "fsdp-2x2"), ("1x4", "fsdp-2x2")], 5, 8),
        slow("sd", [("fsdp-2x2", "fsdp-2x2"), ("fsdp-2x2", "1x4")], 5, 8),
        slow("dmd2-gan", [("fsdp-2x2", "fsdp-2x2"), ("fsdp-2x2", "1x4")], 5, 8),
        slow("lcm", [("fsdp-2x2", "fsdp-2x2"), ("fsdp-2x2", "1x4")], 5, 8),
        slow("scm", [("fsdp-2x2", "fsdp-2x2")], 5, 8),
        exhaustive("one", WAYS, 12, 16),
        exhaustive("two", WAYS[:5], 12, 16),
        exhaustive("feature", [("2x2", "2x2"), ("2x2", "1x4"), ("1x4", "fsdp-2x2")], 12, 16),
        exhaustive("logits", [("2x2", "2x2"), ("2x2", "1x4"), ("1x4", "fsdp-2x2")], 12, 16),
    ],
)
def test_a_stopped_run_resumes_in_any_layout(tmp_path, launched, trained, method, ways, stop, updates):
    """One of its processes is asked to stop. The same layout then reaches the same bits, another the same
    student but for rounding."""
    for first, then in ways:
        folder = tmp_path / f"{first}-{then}"
        shutil.copytree(trained(first, method, updates, stop), folder)
        train(launched, folder, then, method=method, updates=updates)
        whole = trained(then, method, updates)
        for name in networks(whole):
            found, expected = folder / f"{name}.safetensors", whole / f"{name}.safetensors"
            assert same(expected, found) if first == then else distance(expected, found) < 1e-6, name
        records = log(folder)
        assert [r["update"] for r in records] == [*range(7, updates, 7), updates]
        assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in log(whole)], rel=2e-6)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="needs torchao")
def test_eight_bits_in_two_processes(tmp_path, launched):
    """Copies resume to the same bits. Against one process the order of a sum may choose another code."""
    options = {"method": "xl", "updates": 8, "training": {"optimizer": "adamw_8bit"}}
    for name in ("1x4", "2x2"):
        train(launched, tmp_path / name, name, **options)
    parts = tmp_path / "parts"
    train(launched, parts, "2x2", **options, stop_at=5)
    train(launched, parts, "2x2", **options)
    alone, both, again = (tmp_path / name / "student.safetensors" for name in ("1x4", "2x2", "parts"))
    print(f"8 bits in two processes: weights {distance(alone, both):.1e}")
    assert same(both, again) and distance(alone, both) < 1e-4


@pytest.mark.skipif(not SHARDS_ON_CPU, reason=f"FSDP2 on CPUs needs torch {FSDP_ON_CPU}")
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
