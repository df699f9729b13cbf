"""Runs whose student is smaller than its teacher, whole, at a small size: through the command."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline

import diffkd
from diffkd.errors import UserError
from diffkd.models import sizes
from diffkd.runs import config, config_files
from diffkd.runs.session import Session
from tests.refusals import refuse
from tests.runs.test_distill import CONFIG, MEASURED, TEACHER, log, network, same

DEEP = {**TEACHER, "model": {"channels": [8, 16], "layers": 2, "norm_groups": 4}, "evaluation": None}
BLOCKS = ["down_blocks.*.resnets.1", "up_blocks.*.resnets.1", "mid_block"]
DROPPED, NARROWED = {"kind": "drop_blocks", "blocks": BLOCKS}, {"kind": "narrow", "channels": [4, 8]}
FEATURE = {"name": "feature", "updates": 4, "warmup": 0}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(DEEP))
    return tmp_path


def write(name, **more):
    content = {**CONFIG, "method": FEATURE, "evaluation": None, "pictures": 0, **more}
    with open(name, "w") as stream:
        yaml.safe_dump(content, stream)


def bare(records):
    return [{key: value for key, value in r.items() if key not in MEASURED} for r in records]


@pytest.mark.slow
@pytest.mark.parametrize("student", [DROPPED, NARROWED], ids=["dropped", "narrowed"])
def test_compressed_then_faster(here, cli, student):
    """The feature stage's student is the teacher of the stages after it; all open in diffusers."""
    method = [FEATURE, {"name": "progressive", "steps": [2, 1], "substeps": 4, "updates": 2}]
    write("small.yaml", method=method, student=student, evaluation=CONFIG["evaluation"])
    code, out, err = cli("distill", "small.yaml")
    assert (code, err) == (0, "")
    run = here / "runs/students"
    teacher = diffkd.load(here / "runs/teacher/teacher")
    whole = sizes.denoiser_size(teacher)
    for name in ("feature", "2-steps", "1-steps"):
        pupil = diffkd.load(run / "students" / name)
        size = sizes.denoiser_size(pupil)
        card = json.loads((run / "students" / name / "diffkd.json").read_text())
        assert (card["parameters"], card["macs"], card["bytes"]) == size
        assert size.parameters < 0.6 * whole.parameters and size.macs < 0.7 * whole.macs
        assert type(DiffusionPipeline.from_pretrained(run / "students" / name).unet).__name__ == "UNet2DModel"
    assert f"student: {size} ({size.parameters / whole.parameters:.2f} of the parameters" in out
    records = json.loads((run / "metrics.json").read_text())
    found = {(r["model"], r["steps"]): r for r in records}
    assert found["feature", 8]["macs"] == size.macs and found["teacher", 8]["macs"] == whole.macs
    assert [r["stage"] for r in log(run) if r["update"] == r["updates"]] == ["feature", "2-steps", "1-steps"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "student", [DROPPED, {**NARROWED, "importance": "taylor"}], ids=["dropped", "taylor"]
)
def test_a_stopped_run_goes_on_with_the_same_bits(here, cli, student, monkeypatch):
    """With projectors, whose weights and moments are in the checkpoint, and importance by gradients."""

    write("whole.yaml", student=student, out="runs/whole")
    write("parts.yaml", student=student, out="runs/parts")
    assert cli("distill", "whole.yaml").code == 0
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(Session, "should_stop", lambda self: asked.append(0) or len(asked) == 2)
        assert cli("distill", "parts.yaml").code == 130
    assert cli("distill", "parts.yaml").code == 0
    one, two = (here / f"runs/{name}" for name in ("whole", "parts"))
    assert same(network(one / "students/feature"), network(two / "students/feature"))
    assert bare(log(one)) == bare(log(two))


@pytest.mark.slow
def test_straight_into_the_smaller_student(here, cli):
    """The first stage's teacher keeps its size; random weights are another start than the teacher's."""
    method = {"name": "progressive", "steps": [2], "substeps": 2, "updates": 1}
    for name, more in (("a", {}), ("b", {"weights": "random"})):
        write(f"{name}.yaml", method=method, student={**NARROWED, **more}, out=f"runs/{name}")
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
        "drops 1 resnets of some blocks and 0 of down_blocks.1",
    ),
    "groups": (
        {"student": {"kind": "narrow", "channels": [6, 8]}},
        "channels 6 is not a multiple of .*norm_num_groups 4",
    ),
    "heads": (
        {"student": {"kind": "narrow", "channels": [4, 12]}},
        "channels 12 is not a multiple of .*attention_head_dim 8",
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
def test_refused_before_the_teacher_is_trained(here, cli, case):
    more, message = REFUSED[case]
    write("small.yaml", **{"student": NARROWED, **more})
    assert re.search(message, refuse(cli, here, "distill", "small.yaml"))


def test_compiling_and_hooks_are_refused_together(here):
    """On a GPU, that is: elsewhere compiling is refused anyway."""
    write("small.yaml", training={"compile": True}, student=NARROWED)
    settings = config_files.load(here / "small.yaml", config.Distill)
    device = SimpleNamespace(device=torch.device("cuda"), num_processes=1)
    with pytest.raises(UserError, match="training.compile bypasses the hooks of method feature; leave it"):
        settings.check(device)
    other = config_files.load(here / "small.yaml", config.Distill, ["method={name: output}"])
    other.check(device)
