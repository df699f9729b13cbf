"""One, two, four and eight processes: the same images, caches and metrics, and the same student."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests import text_to_image
from tests.refusals import tree
from tests.runs.test_parallel import SHARDS_ON_CPU, distance, log
from tests.runs.test_text_to_image_processes import CONFIG
from tests.runs.tiny import write

pytestmark = pytest.mark.slow
WORLDS = (1, 2, 4, 8)
MICRO_BATCHES, UPDATES = 8, 4


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(launched, world, *args, module="diffkd.cli"):
    done = launched(world, *args, module=module)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("out", ["drawn", "drawn.npz"])
def test_the_same_images(here, make_pipeline, launched, out):
    """Batches of 3, one more than each of eight has, and a last one that is not full."""
    pipeline = make_pipeline(here, classes=4)
    args = ["sample", pipeline, "-n", 25, "--steps", 2, "--batch-size", 3]
    for world in WORLDS:
        run(launched, world, *args, "--out", here / str(world) / out)
    alone = tree(here / "1")
    assert len(alone) == (28 if out == "drawn" else 2)
    assert all(tree(here / str(world)) == alone for world in WORLDS)


def test_the_same_cache(here, launched):
    """Of latents and captions, byte for byte, each process with files of its own."""
    text_to_image.teacher_and_images(here, [f"caption {i}" for i in range(10)])
    write("run.yaml", CONFIG)
    for world in WORLDS:
        run(launched, world, "cache", "run.yaml", f"out=by-{world}", module="tests.many")
    alone = tree(here / "by-1/cache")
    files = [name for name in alone if name.endswith(".safetensors")]
    print(f"{len(files)} files of a cache")
    assert len(files) >= 10
    assert all(tree(here / f"by-{world}/cache") == alone for world in WORLDS)


def test_the_same_metrics(here, make_pipeline, launched):
    """Sums of float64, in another order."""
    pipeline = make_pipeline(here, classes=10)
    args = ["evaluate", pipeline, "--reference", "digits", "--samples", 70, "--batch-size", 4, "--steps", 2]
    found = {}
    for world in WORLDS:
        run(launched, world, *args, "--metrics", "fid,kid,is,prdc", "--out", f"{world}.json")
        found[world] = json.loads(Path(f"{world}.json").read_text())
        assert found[world]["protocol"]["processes"] == world
    for key in ("fid", "kid", "is", "precision", "recall", "density", "coverage"):
        values = [found[world][key] for world in WORLDS]
        print(f"{key}: {values[0]!r}, off by {max(abs(value - values[0]) for value in values):.1e}")
        assert values == pytest.approx(values[:1] * len(WORLDS), rel=1e-9, abs=1e-12), key


def measured(launched, folder, world, kind):
    """Trains in so many processes; what each of them saw."""
    training = {"batch_size": 16, "micro_batches": MICRO_BATCHES, "log_every": 1, "checkpoint_every": 2}
    job = {
        "folder": str(folder), "world": world, "kind": kind, "updates": UPDATES, "network": "digits",
        "training": training,
    }  # fmt: skip
    folder.mkdir()
    run(launched, world, json.dumps(job), module="tests.sharded")
    return [json.loads((folder / f"watched-{rank}.json").read_text()) for rank in range(world)]


def per_update(seen):
    """The bytes of an update by collective, the same in each but the first, in which DDP also tells sizes."""
    [every] = {json.dumps(one, sort_keys=True) for each in seen for one in each["updates"][2:]}
    return Counter(json.loads(every))


def test_the_same_student_and_what_it_costs(here, launched):
    """The table of docs/scale.md, whose formula this holds: with P the bytes of the weights, R of those in no
    block that is gathered by itself, and m the micro-batches of a process, copies exchange P, shards
    (2m + 1) P - m R, and both a dozen bytes to agree."""
    alone = measured(launched, here / "alone", 1, "copies")
    weights = alone[0]["state"] // 4
    rows = [f"| 1 | whole | | | | {alone[0]['state'] / 1e6:.2f} | {alone[0]['peak'] / 1e6:.0f} |"]
    for kind in ("copies", "fsdp"):
        for world in WORLDS[1:]:
            if kind == "fsdp" and not SHARDS_ON_CPU:
                continue
            folder = here / f"{kind}-{world}"
            seen = measured(launched, folder, world, kind)
            bytes_ = per_update(seen)
            off = distance(here / "alone/student.safetensors", folder / "student.safetensors")
            losses = [[record["loss"] for record in log(one)] for one in (here / "alone", folder)]
            assert losses[1] == pytest.approx(losses[0], rel=2e-6) and off < 1e-6
            state = max(one["state"] for one in seen)
            peak = max(one["peak"] for one in seen)
            rows.append(
                f"| {world} | {kind} | {off:.1e} | {sum(bytes_.values()) / 1e6:.2f} | {dict(bytes_)} "
                f"| {state / 1e6:.2f} | {peak / 1e6:.0f} |"
            )
            print(rows[-1])
            micro, rest = MICRO_BATCHES // world, seen[0]["rest"]
            expected = weights if kind == "copies" else (2 * micro + 1) * weights - micro * rest
            assert sum(bytes_.values()) == pytest.approx(expected, rel=0.01)
            assert state == pytest.approx(alone[0]["state"] / (1 if kind == "copies" else world), rel=0.03)
    print("\n".join([f"weights: {weights} bytes, outside of blocks {rest}", *rows]))
