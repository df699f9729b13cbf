"""`diffkd distill` with `student: {kind: lora}`: chains on one base, what is saved, resuming, refusals."""

from __future__ import annotations

import json
import re
import shutil
import signal

import numpy as np
import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from safetensors.torch import load_file

import diffkd
from diffkd.core import adapters
from diffkd.core.digest import digest
from diffkd.errors import UserError
from diffkd.models.lora_files import KOHYA
from diffkd.models.source import ADAPTER
from diffkd.runs import distill as job
from diffkd.runs.config import Distill
from diffkd.training import launch
from tests import text_to_image
from tests.refusals import refuse
from tests.runs.tiny import OF_LATENTS, ROOT, UNMEASURED, log, network, records, same, write

CHAIN = [
    {"name": "progressive", "steps": [4, 2], "updates": [2, 2], "learning_rate": 1e-2},
    {"name": "dmd2", "steps": 2, "updates": 3, "fake_updates": 1, "learning_rate": 1e-2, "warmup": 0},
]
STUDENTS = ["4-steps", "2-steps", "2-steps-dmd2"]
RUN = {
    **UNMEASURED, "data": {"kind": "digits"}, "spread_every": None, "method": CHAIN,
    "student": {"kind": "lora", "rank": 2},
    "training": {"batch_size": 8, "micro_batches": 2, "log_every": 1, "checkpoint_every": 1},
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch, make_pipeline):
    monkeypatch.chdir(tmp_path)
    write("run.yaml", RUN, teacher={"path": str(make_pipeline(tmp_path, name="teacher"))}, out="run")
    return tmp_path


def adapter(folder):
    return load_file(folder / ADAPTER)


def seen(patch):
    """What every stage trains, as it begins: its networks by name."""
    stages, train = {}, job._train

    def watched(session, method, stage, nets, *args):
        stages[stage.name] = job.networks_of(method, stage, nets["teacher"], nets["student"])
        train(session, method, stage, nets, *args)

    patch.setattr(job, "_train", watched)
    return stages


def test_a_chain_goes_on_with_one_adapter_on_one_base(here, cli, monkeypatch):
    """Each stage has one base in memory; the last stage's adapter, frozen, teaches the next; what is saved of
    a family whose pipelines load no adapters is whole, and the adapter beside it."""
    stages = seen(monkeypatch)
    outcome = cli("distill", "run.yaml", "evaluation={samples: 8, teacher_steps: [8]}", "pictures=2")
    assert outcome.code == 0, outcome.stderr
    base = diffkd.load("teacher").network.state_dict()
    for name, nets in stages.items():
        together = {p.data_ptr(): p.numel() for net in nets.values() for p in net.parameters()}
        own = {key: adapters.own(net) for key, net in nets.items()}
        each = sum(p.numel() for p in own["student"].values())
        having = sum(bool(found) for found in own.values())
        whole = sum(value.numel() for value in base.values())
        assert having == (1 if name == "4-steps" else 2) and sum(together.values()) == whole + having * each
    assert {*stages["2-steps-dmd2"]} == {"teacher", "student", "fake"}
    assert not adapters.own(stages["2-steps-dmd2"]["teacher"])  # the original
    taught_by = adapters.own(stages["2-steps"]["teacher"].network)
    place = here / "run" / "students"
    for name, parameter in taught_by.items():
        assert torch.equal(parameter, adapter(place / "4-steps")[name.replace(".default", "")])
    for name in STUDENTS:
        weights = load_file(place / name / "unet" / "diffusion_pytorch_model.safetensors")
        assert weights.keys() == base.keys() and (place / name / "model_index.json").exists()
        found = adapter(place / name)
        for key, value in weights.items():
            layer = key.removesuffix(".weight")
            if f"{layer}.lora_A.weight" in found:
                down, up = (found[f"{layer}.lora_{one}.weight"].flatten(1) for one in "AB")
                change = (up.double() @ down.double()).reshape(value.shape)
                assert change.abs().max() > 0 and (base[key] + change - value).abs().max() <= 1e-6
            else:
                assert torch.equal(base[key], value)
        (record,) = (one for one in records(here / "run") if one["model"] == name)
        saved = diffkd.load(place / name).network.state_dict()
        assert record["protocol"]["target"]["sha256"] == digest(saved)
        card = json.loads((place / name / "diffkd.json").read_text())
        assert (card["lora"]["rank"], card["lora"]["base"]) == (2, str(here / "teacher"))
    assert not same(adapter(place / "4-steps"), adapter(place / "2-steps"))
    assert not (place / "4-steps" / KOHYA).exists()


def test_a_run_killed_amid_an_update_ends_with_the_same_bits(here, cli, launched, monkeypatch):
    """As for whole students; its checkpoints are of adapters."""
    write("run.yaml", RUN, teacher={"path": str(here / "teacher")}, method=CHAIN[1])
    assert cli("distill", "run.yaml", "out=whole").code == 0
    strike = ("2-steps", "2+", int(signal.SIGKILL))
    done = launched(1, *strike, "distill", "run.yaml", "out=run", module="tests.runs.killed")
    assert done.returncode == -signal.SIGKILL, done.stderr
    (*_, last) = sorted((here / "run" / "checkpoints").iterdir())
    held = {file.stem: load_file(file) for file in last.glob("*.safetensors")}
    assert {*held} == {"student", "student-optimizer", "ema", "fake", "fake-optimizer"}
    assert all(".lora_" in key for tensors in held.values() for key in tensors)
    assert cli("distill", "run.yaml", "out=run").code == 0
    assert same(*(adapter(here / run / "students" / "2-steps") for run in ("whole", "run")))
    assert log(here / "whole") == log(here / "run")


# Stable Diffusion, whose pipelines load adapters


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A run of Stable Diffusion's students, in bfloat16, and what it read."""
    work = tmp_path_factory.mktemp("work")
    text_to_image.teacher_and_images(work, ["a red ring", "two crosses"])
    config = {
        **OF_LATENTS, "method": {**OF_LATENTS["method"], "learning_rate": 0.1, "updates": [1, 1]},
        "pictures": 0, "student": {"kind": "lora", "rank": 2, "targets": ["to_q", "to_k", "conv1"]},
        "teacher": {"path": str(work / "teacher")}, "out": str(work / "run"),
        "data": {**OF_LATENTS["data"], "path": str(work / "images")},
        "training": {**OF_LATENTS["training"], "precision": "bf16"},
    }  # fmt: skip
    write(work / "run.yaml", config)
    return work


@pytest.fixture
def trained(work, cli):
    if not (work / "run" / "students").exists():
        outcome = cli("distill", work / "run.yaml")
        assert outcome.code == 0, outcome.stderr
        assert "student: an adapter of rank 2 on" in outcome.stdout
    return work / "run" / "students"


def test_a_student_is_its_adapter_and_its_scheduler(trained):
    for name in ("4-steps", "2-steps"):
        files = {str(p.relative_to(trained / name)) for p in (trained / name).rglob("*") if p.is_file()}
        assert files == {ADAPTER, KOHYA, "scheduler/scheduler_config.json", "README.md", "diffkd.json"}
        assert any(value.abs().max() > 0 for key, value in adapter(trained / name).items() if "lora_B" in key)
    text = (trained / "2-steps" / "README.md").read_text()
    assert "pipeline.load_lora_weights(folder)" in text and "guidance_scale=1.0" in text


def test_a_fused_student_draws_the_same(trained, tmp_path, cli, monkeypatch):
    """By commands alone: sampled as a folder of an adapter, and as the pipeline that fuse makes of it."""
    monkeypatch.chdir(tmp_path)
    outcome = cli("fuse", trained / "2-steps", "--out", tmp_path / "whole")
    assert (outcome.code, outcome.stderr) == (0, "") and "a whole pipeline" in outcome.stdout
    assert (tmp_path / "whole" / "model_index.json").exists() and not (tmp_path / "whole" / ADAPTER).exists()
    card, before = (
        json.loads((place / "diffkd.json").read_text()) for place in (tmp_path / "whole", trained / "2-steps")
    )
    assert "lora" not in card and "call" not in card and card["steps"] == 2
    assert card["guidance_baked_in"] == before["guidance_baked_in"] == 3.0
    drawn = []
    for place in (trained / "2-steps", tmp_path / "whole", trained.parent.parent / "teacher"):
        out = tmp_path / f"{place.name}.npz"
        steps = ("--steps", 2, "--sampler", "ddim") if place.name == "teacher" else ()
        assert cli("sample", place, "--out", out, "--prompt", "a red ring", "-n", 2, *steps).code == 0
        drawn.append(np.load(out)["arr_0"].astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1 < np.abs(drawn[0] - drawn[2]).max()
    refuse(cli, tmp_path, "fuse", trained / "2-steps", "--out", "whole", says="exists already")
    refuse(cli, tmp_path, "fuse", "whole", "--out", "x", says="is no adapter, and is whole as it is")


def test_evaluate_opens_it_and_refuses_another_base(trained, work, tmp_path, cli, monkeypatch):
    shutil.copytree(trained / "2-steps", tmp_path / "student")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red ring\n")
    asked = f"--reference {work / 'images'} --features shapes --samples 4 --prompts prompts.txt".split()
    outcome = cli("evaluate", "student", *asked, "--out", "record.json")
    assert outcome.code == 0, outcome.stderr
    weights = work / "teacher" / "unet" / "diffusion_pytorch_model.safetensors"
    kept = weights.read_bytes()
    try:
        weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        for command in (("evaluate", "student", *asked), ("fuse", "student", "--out", "x")):
            refuse(cli, tmp_path, *command, says=["adapter for another base than", "the weights differ"])
    finally:
        weights.write_bytes(kept)
    refuse(cli, tmp_path, "evaluate", "student", *asked[:4], "--sampler", "stock", says="run diffkd fuse on")


def test_adapters_take_the_guidance_weight_as_an_input(work, tmp_path, cli, launched, monkeypatch):
    """`guidance`, whose student is saved merged, then an adapter on that; killed, both are the same bits."""
    monkeypatch.chdir(tmp_path)
    given = {"updates": 2, "learning_rate": 1e-2, "warmup": 0}
    chain = [{"name": "guidance", "range": [1, 9], **given}, {"name": "progressive", "steps": [2], **given}]
    config = yaml.safe_load((work / "run.yaml").read_text())
    write("run.yaml", config, method=chain, training=OF_LATENTS["training"], out="whole")
    code, out, err = cli("distill", "run.yaml")
    assert code == 0, err
    assert out.count("saved merged, as it learned with one more number as an input") == 1
    strike = ("guidance", "1+", int(signal.SIGKILL))
    done = launched(1, *strike, "distill", "run.yaml", "out=run", module="tests.runs.killed")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert cli("distill", "run.yaml", "out=run").code == 0
    whole, run = (tmp_path / out / "students" for out in ("whole", "run"))
    first, last = network(whole / "guidance"), adapter(whole / "2-steps")
    assert same(first, network(run / "guidance")) and same(last, adapter(run / "2-steps"))
    assert first["time_embedding.cond_proj.weight"].any() and not (whole / "guidance" / ADAPTER).exists()
    assert all(value.any() for key, value in last.items() if "lora_B" in key)
    assert not any("cond_proj" in key for key in last)
    drawn = []
    for weight in (1.0, 9.0):
        asked = ("--out", f"{weight}.npz", "--prompt", "a red ring", "-w", weight)
        assert cli("sample", whole / "2-steps", *asked).code == 0
        drawn.append(np.load(f"{weight}.npz")["arr_0"].astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() > 0


# what is refused


REFUSED = [
    ("student.rank=0", "student.rank"),
    ("student.rank=99", "student.rank 99 is above the size of layer"),
    (
        "student.targets=[to_x]",
        "has to_x, which no layer of a UNet2DModel is called or ends in; there",
    ),
]


@pytest.mark.parametrize(("override", "message"), REFUSED)
def test_what_an_adapter_cannot_be_is_refused(here, cli, override, message):
    assert re.search(message, refuse(cli, here, "distill", "run.yaml", override))


# the configs of the tables in docs/lora.md


FEW = ("student.rank=2", "method.updates=1", "method.warmup=0", "training.batch_size=4", "pictures=0")


def assert_configured(folder):
    for name in ("8-steps", "4-steps"):
        found = [value for key, value in adapter(folder / "students" / name).items() if "lora_B" in key]
        assert all(value.abs().max() > 0 for value in found)


def test_the_config_of_digits_runs(here, cli, make_pipeline):
    make_pipeline(here, name="labelled", classes=11)
    given = "teacher={path: labelled, null_label: 10}", "evaluation=null"
    outcome = cli("distill", ROOT / "configs/digits/lora.yaml", *given, *FEW)
    assert outcome.code == 0, outcome.stderr
    assert_configured(here / "runs/digits-lora")


def test_the_config_of_shapes_runs(work, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = f"teacher={{path: {work / 'teacher'}}}", "evaluation=null", "data.count=8"
    outcome = cli("distill", ROOT / "configs/shapes/lora.yaml", *given, *FEW)
    assert outcome.code == 0, outcome.stderr
    assert_configured(tmp_path / "runs/shapes-lora")


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_shards_are_refused(here, kind):
    config = Distill.model_validate({**RUN, "teacher": {"path": "teacher"}, "out": "run"})
    accelerator = launch.make_accelerator(config.training)
    config.check(accelerator)
    accelerator.state.distributed_type = kind
    with pytest.raises(UserError, match="student.kind lora does not work under (FSDP2|DeepSpeed)"):
        config.check(accelerator)
