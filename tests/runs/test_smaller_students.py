"""Runs whose student is smaller than its teacher, whole, at a small size: through the command."""

import json
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from diffusers import DiffusionPipeline

import diffkd
from diffkd.errors import UserError
from diffkd.models import sizes
from diffkd.runs.config import Distill
from diffkd.runs.config_files import load
from tests.refusals import refuse
from tests.runs.tiny import (
    CONFIG,
    DEEP_TEACHER,
    UNMEASURED,
    assert_same_runs,
    log,
    network,
    records,
    same,
    signal_at,
    write,
)

BLOCKS = ["down_blocks.*.resnets.1", "up_blocks.*.resnets.1", "mid_block"]
DROPPED, NARROWED = {"kind": "drop_blocks", "blocks": BLOCKS}, {"kind": "narrow", "channels": [4, 8]}
FEATURE = {"name": "feature", "updates": 4, "warmup": 0}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def config(here, deep_teacher):
    """config(name, key=value, ...): writes a config that compresses the teacher trained for all tests."""

    def make(name, **more):
        content = {**CONFIG, **UNMEASURED, "teacher": {"path": str(deep_teacher)}, "method": FEATURE}
        write(name, content, **more)

    return make


@pytest.mark.parametrize("student", [DROPPED, NARROWED], ids=["dropped", "narrowed"])
def test_compressed_then_faster(here, cli, config, deep_teacher, student):
    """The feature stage's student is the teacher of the stages after it; all open in diffusers."""
    method = [FEATURE, {"name": "progressive", "steps": [2, 1], "substeps": 4, "updates": 2}]
    config("small.yaml", method=method, student=student, evaluation=CONFIG["evaluation"])
    code, out, err = cli("distill", "small.yaml")
    assert (code, err) == (0, "")
    run = here / "runs/students"
    whole = sizes.denoiser_size(diffkd.load(deep_teacher))
    for name in ("feature", "2-steps", "1-steps"):
        pupil = diffkd.load(run / "students" / name)
        size = sizes.denoiser_size(pupil)
        card = json.loads((run / "students" / name / "diffkd.json").read_text())
        assert (card["parameters"], card["macs"], card["bytes"]) == size
        assert size.parameters < 0.6 * whole.parameters and size.macs < 0.7 * whole.macs
        assert type(DiffusionPipeline.from_pretrained(run / "students" / name).unet).__name__ == "UNet2DModel"
    assert f"student: {size} ({size.parameters / whole.parameters:.2f} of the parameters" in out
    macs = {(r["model"], r["steps"]): r["macs"] for r in records(run)}
    assert macs["feature", 8] == size.macs and macs["teacher", 8] == whole.macs
    assert [r["stage"] for r in log(run) if r["update"] == r["updates"]] == ["feature", "2-steps", "1-steps"]


@pytest.mark.parametrize(
    "student", [DROPPED, {**NARROWED, "importance": "taylor"}], ids=["dropped", "taylor"]
)
def test_a_stopped_run_ends_with_the_same_bits(here, cli, config, student, monkeypatch):
    """With projectors, whose weights and moments are in the checkpoint, and importance by gradients."""
    config("small.yaml", student=student)
    assert cli("distill", "small.yaml", "out=whole").code == 0
    with monkeypatch.context() as patch:
        signal_at(patch, "feature", 1, send=[signal.SIGTERM])
        assert cli("distill", "small.yaml", "out=parts").code == 130
    assert cli("distill", "small.yaml", "out=parts").code == 0
    assert_same_runs(here / "whole", here / "parts")


def test_straight_into_the_smaller_student(here, cli, config):
    """The first stage's teacher keeps its size; random weights are another start than the teacher's."""
    method = {"name": "progressive", "steps": [2], "substeps": 2, "updates": 1}
    for name, more in (("a", {}), ("b", {"weights": "random"})):
        config(f"{name}.yaml", method=method, student={**NARROWED, **more}, out=f"runs/{name}")
        assert cli("distill", f"{name}.yaml").code == 0
    a, b = (network(here / f"runs/{name}/students/2-steps") for name in "ab")
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()} and not same(a, b)


REFUSED = {
    "a block that is not there": (
        {"student": {"kind": "drop_blocks", "blocks": ["middle"]}},
        r"'middle', which this network does not have; it has down_blocks.0.resnets.0, .*mid_block",
    ),
    "not as many of each": (
        {"student": {"kind": "drop_blocks", "blocks": ["down_blocks.0.resnets.1"]}},
        "drops 1 resnets of down_blocks.0 and 0 of up_blocks.1",
    ),
    "groups": (
        {"student": {"kind": "narrow", "channels": [6, 8]}},
        "channels 6 is not a multiple of .*norm_num_groups 4",
    ),
    "heads": (
        {"student": {"kind": "narrow", "channels": [4, 12]}},
        "channels 12 is not a multiple of .*heads of 8 channels",
    ),
    "both": (
        {"student": {"kind": "narrow", "channels": [4, 8], "ratio": 0.5}},
        "either channels .* or ratio",
    ),
    "a kind that is not": (
        {"student": {"kind": "prune"}},
        "student is .*'prune'.* (copy|drop_blocks|narrow|from_config)",
    ),
    "resolution": (
        {"method": {**FEATURE, "blocks": {"conv_in": "down_blocks.1"}}},
        r"conv_in of the teacher outputs 8x8 and down_blocks.1 .* 4x4; match modules of the same resolution",
    ),
    "a module that is not there": (
        {"method": {**FEATURE, "blocks": ["down_blocks.7"]}},
        "'down_blocks.7', which the teacher does not have; it has down_blocks.0",
    ),
    "no share": (
        {"method": {**FEATURE, "task": 0, "output": 0, "feature": 0}},
        "all 0; give one of them a weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_teacher_is_trained(here, cli, config, case):
    write("teacher.yaml", DEEP_TEACHER)
    more, message = REFUSED[case]
    config("small.yaml", **{"student": NARROWED, "teacher": CONFIG["teacher"], **more})
    assert re.search(message, refuse(cli, here, "distill", "small.yaml"))


def test_compiling_and_hooks_are_refused_together(here, config):
    """On a GPU, that is: elsewhere compiling is refused anyway."""
    config("small.yaml", training={"compile": True}, student=NARROWED)
    settings = load(here / "small.yaml", Distill)
    device = SimpleNamespace(
        device=torch.device("cuda"), num_processes=1, distributed_type=DistributedType.NO
    )  # fmt: skip
    with pytest.raises(UserError, match="training.compile bypasses the hooks of method feature; leave it"):
        settings.check(device)
    load(here / "small.yaml", Distill, ["method={name: output}"]).check(device)
