"""Checkpoints of sharded networks, by real processes: what is on the disk, what it costs, who can go on."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from diffkd.training.checkpoints import Checkpoints
from diffkd.training.parts import Divided
from tests.runs.test_parallel import LAYOUTS, SHARDS_ON_CPU, log, same
from tests.training.test_parts import read

pytestmark = pytest.mark.skipif(not SHARDS_ON_CPU, reason="FSDP2 is wrong on CPUs before torch 2.9")
TRAINING = {"checkpoint_every": 2}
UPDATES = 6  # the last checkpoint is of the fourth


def train(launched, folder, layout, **options):
    """tests/sharded.py in the processes of that layout; its exit status and stderr."""
    world, kind = LAYOUTS[layout]
    job = {"folder": str(folder), "world": world, "kind": kind, "updates": UPDATES, "training": TRAINING}
    done = launched(world, json.dumps({**job, **options}), module="tests.sharded")
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def made(built_once):
    """made(launched, layout) -> the folder of such a run, made once."""

    def get(launched, layout):
        def build(folder):
            status, err = train(launched, folder, layout)
            assert status == 0, err[-4000:]

        return built_once(f"shards-{layout}", build)

    return get


def watched(folder, world):
    return [json.loads((folder / f"watched-{rank}.json").read_text()) for rank in range(world)]


def test_no_process_holds_or_gathers_the_whole_state(made, launched):
    """Each writes its rows of every tensor, and nothing but a few hundred bytes of the log is exchanged; put
    together they are what the main process would have gathered, to the bit."""
    folder = made(launched, "fsdp-2x2")
    seen = watched(folder, 2)
    gathered = load_file(folder / "gathered.safetensors")
    total = sum(value.nbytes for value in gathered.values())
    largest = max(value.nbytes for value in gathered.values())
    for one in seen:
        assert len(one["saved"]) == 2
        assert max(one["saved"]) < 0.55 * total and min(one["saved"]) > 0.45 * total
        assert sum(one["exchanged"][-1].values()) < largest
    assert sum(one["saved"][-1] for one in seen) == total
    print(f"of {total} bytes: {[one['saved'][-1] for one in seen]}, exchanged {seen[0]['exchanged'][-1]}")
    found = Checkpoints(folder / "checkpoints", {}).load(0)
    assert all(isinstance(one, Divided) for values in found.tensors.values() for one in values.values())
    kinds = {"student": "network", "student-optimizer": "optimizer", "ema": "ema"}
    tensors = {f"student/{kinds[file]}/{key}": value for (file, key), value in read(found.tensors).items()}
    assert tensors.keys() == gathered.keys()
    assert all(torch.equal(value, gathered[key]) for key, value in tensors.items())


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("fsdp-2x2", "1x4"),
        ("fsdp-2x2", "fsdp-4x1"),
        pytest.param("1x4", "fsdp-2x2", marks=pytest.mark.slow),
        pytest.param("fsdp-2x2", "2x2", marks=pytest.mark.slow),
        pytest.param("fsdp-4x1", "fsdp-2x2", marks=pytest.mark.slow),
    ],
)
def test_any_layout_goes_on_with_the_same_tensors(made, launched, tmp_path, first, then):
    """A run in one layout that goes on in another begins with its very tensors, whole or in parts."""
    folder = tmp_path / "run"
    shutil.copytree(made(launched, first), folder)
    status, err = train(launched, folder, then)
    assert status == 0, err[-4000:]
    saved, restored = (load_file(folder / f"{name}.safetensors") for name in ("gathered", "restored"))
    assert restored.keys() == saved.keys()
    assert all(torch.equal(restored[key], saved[key]) for key in saved)
    assert log(folder)[-1]["update"] == UPDATES


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_killed_amid_the_writing_of_a_part(made, launched, tmp_path, rank):
    """The checkpoint before it stays the newest, and the same command ends with the same bits."""
    folder = tmp_path / "run"
    status, err = train(launched, folder, "fsdp-2x2", strike=[rank, 2])
    assert status in (-signal.SIGKILL, 1, -signal.SIGTERM), err[-4000:]
    names = [path.name for path in (folder / "checkpoints").iterdir() if not path.name.startswith(".")]
    assert names == ["stage-00-update-0000002"]
    status, err = train(launched, folder, "fsdp-2x2")
    assert status == 0, err[-4000:]
    assert same(made(launched, "fsdp-2x2") / "student.safetensors", folder / "student.safetensors")
    left = [path.name for path in (folder / "checkpoints").iterdir()]
    assert sorted(left) == ["stage-00-update-0000002", "stage-00-update-0000004"]
