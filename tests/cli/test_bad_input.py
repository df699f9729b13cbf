"""A user's mistakes: one line that names the thing, the value and the remedy, status 2, nothing written."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file

from diffkd.runs import model_evaluator
from tests.refusals import tree

TRAIN = {
    "out": "runs/teacher",
    "data": {"kind": "digits"},
    "model": {"channels": [8, 16], "norm_groups": 4, "mid_attention": False},
    "denoising": {"updates": 2, "warmup": 0},
    "training": {"batch_size": 4},
    "evaluation": None,
    "pictures": 2,
}
DISTILL = {
    "out": "runs/students",
    "teacher": {"path": "plain"},
    "data": {"kind": "digits"},
    "method": {"name": "progressive", "steps": [4, 2], "updates": 1},
    "training": {"batch_size": 4},
    "evaluation": None,
    "pictures": 2,
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory, make_pipeline) -> Path:
    """plain: unconditional, T = 1024. labelled: ten classes, no null label. linear: epsilon, T = 1000."""
    root = tmp_path_factory.mktemp("pipelines")
    make_pipeline(root, name="plain")
    make_pipeline(root, name="labelled", classes=10)
    make_pipeline(root, name="linear", prediction="epsilon", scheduler="linear", pipeline="DDPMPipeline")
    return root


@pytest.fixture
def here(tmp_path, monkeypatch, pipelines) -> Path:
    """The working directory, with the three pipelines and two valid configs."""
    for name in ("plain", "labelled", "linear"):
        shutil.copytree(pipelines / name, tmp_path / name)
    write(tmp_path / "train.yaml", TRAIN)
    write(tmp_path / "distill.yaml", DISTILL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_evaluator, "PREVIEW_STEPS", 2)  # quick pictures where a run does work
    return tmp_path


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture
def refused(cli, here) -> Callable[..., str]:
    """refused(*args, says=[...]) -> the message with which the command refuses."""

    def run(*args: object, says: list[str] | str = "", lines_before: int = 0) -> str:
        before = tree(here)
        code, out, err = cli(*args)
        after = tree(here)
        lines = err.splitlines()
        assert (code, len(lines)) == (2, 1 + lines_before), err
        assert all(re.match("diffkd: ", line) for line in lines), err
        assert lines[-1].startswith("diffkd: error: ") and out == ""
        for words in [says] if isinstance(says, str) else says:
            assert words in lines[-1]
        assert {k for k in after if after[k] != before.get(k)} | (before.keys() - after.keys()) == set()
        return lines[-1]

    return run


def sample(*args: object) -> tuple[object, ...]:
    return ("sample", *args, "--out", "drawn", "-n", 2, "--device", "cpu")


# the rest fails for its own reason ------------------------------------------------------------------------


def test_the_valid_commands_work(cli, here):
    assert cli("train", "train.yaml").code == 0
    assert cli("distill", "distill.yaml").code == 0
    code, _, err = cli(*sample("runs/students/students/2-steps"))
    assert (code, err) == (0, "")
    assert sorted(p.name for p in (here / "drawn").iterdir()) == ["000000.png", "000001.png", "diffkd.json"]
    assert (here / "drawn-grid.png").is_file()


def test_a_real_process_prints_one_line(here):
    command = [sys.executable, "-m", "diffkd.cli", "train", "train.yaml", "training.batchsize=3"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=here)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "diffkd: error: config key training.batchsize is unknown; did you mean batch_size?\n"


# the command line -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["sample", "plain", "--out", "drawn", "-n", "0"], "-n"),
        (["sample", "plain", "--out", "drawn", "-n", "many"], "-n"),
        (["sample", "plain", "--out", "drawn", "--eta", "2"], "eta"),
        (["sample", "plain", "--out", "drawn", "--seed", "-1"], "seed"),
        (["sample", "plain"], "--out"),
        (["sample", "plain", "--outt", "drawn"], "--outt"),
        (["train"], "Missing argument"),
        (["trian", "train.yaml"], "trian"),
    ],
)
def test_usage(refused, args, says):
    refused(*args, says=says)


def test_no_arguments_print_help(cli):
    code, out, err = cli()
    assert "distill" in out + err and code in (0, 2)


# configs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "distill"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, ["c.yaml", "cannot be read", "give a YAML file"]),
        ("", ["c.yaml", "no keys", "configs/"]),
        ("# nothing but a comment\n", ["c.yaml", "no keys"]),
        ("- out: x\n- data: y\n", ["c.yaml", "no keys"]),
        ("just words", ["c.yaml", "no keys"]),
        ("out: [x\n", ["c.yaml", "not valid YAML"]),
        ("out: x\n\tdata: y\n", ["c.yaml", "not valid YAML"]),
        ("out: !!python/object/apply:os.getcwd []\n", ["c.yaml", "not valid YAML"]),
        ("out: runs/x\n", ["missing"]),
    ],
)
def test_files_that_are_not_configs(refused, here, command, content, says):
    if content is not None:
        write(here / "c.yaml", content)
    refused(command, "c.yaml", says=says)


@pytest.mark.parametrize("command", ["train", "distill"])
@pytest.mark.parametrize(
    ("line", "says"), [("no: 3", "config key "), ("3: 4", "config key 3"), ("null: 1", "config key ")]
)
def test_keys_that_are_not_strings(refused, here, command, line, says):
    """YAML reads a bare no as false."""
    write(here / "c.yaml", (here / f"{command}.yaml").read_text() + line + "\n")
    refused(command, "c.yaml", says=says)


def test_a_config_in_another_encoding_or_a_folder(refused, here):
    (here / "c.yaml").write_bytes("out: Münze\n".encode("latin-1"))
    refused("train", "c.yaml", says=["c.yaml", "not valid YAML"])
    refused("train", "plain", says=["plain", "cannot be read", "give a YAML file"])


@pytest.mark.parametrize(
    ("command", "override", "says"),
    [
        ("train", "training.batchsize=8", ["training.batchsize is unknown", "did you mean batch_size?"]),
        ("train", "training.batch_size=0", ["training.batch_size is 0", "greater than or equal to 1"]),
        ("train", "data.kind=digit", ["config key data", "'digit'", "digits", "folder", "datasets"]),
        ("train", "data={kind: digits, 3: 4}", ["config key data.3"]),
        ("train", "training", ["override 'training'", "key.sub=value"]),
        ("train", "training.ema=[", ["training.ema=[", "not valid YAML"]),
        ("train", "training.betas=[0.9, 2]", ["training.betas", "2", "less than 1"]),
        ("train", "model.channels=[0]", ["model.channels", "0"]),
        ("train", "model.channels=[6, 12]", ["model.norm_groups 4", "6", "divides each of model.channels"]),
        ("train", "model.channels=[8, 8, 8, 8, 8]", ["8x8", "16 divides"]),
        ("train", "model.attention=[true]", ["model.attention", "1 entries for 2"]),
        ("train", "model={channels: [4, 4], norm_groups: 4}", ["model.attention_head_dim 8", "4 channels"]),
        (
            "train",
            "model={channels: [4, 8], norm_groups: 4, attention: [true, false]}",
            ["model.attention_head_dim 8", "4 channels"],
        ),
        ("train", "schedule.num_train_timesteps=1", ["schedule.num_train_timesteps"]),
        ("train", "evaluation={teacher_steps: [0]}", ["evaluation.teacher_steps", "0"]),
        (
            "train",
            "evaluation={features: no.such.Network}",
            ["feature network 'no.such.Network'", "use digits"],
        ),
        ("train", "evaluation={features: inseption}", ["feature network 'inseption'"]),
        ("train", "training.micro_batches=3", ["batch_size 4", "3 micro-batches"]),
        ("train", "prediction=epsilon", ["epsilon", "alpha = 0", "v_prediction"]),
        ("train", "out=plain/model_index.json", ["plain/model_index.json is a file"]),
        ("train", "out=plain/model_index.json/run", ["plain/model_index.json"]),
        ("train", "out=plain", ["plain is not empty", "use another out"]),
        ("distill", "method.steps=[2, 4]", ["[2, 4]", "do not decrease", "2 then 4"]),
        ("distill", "method.steps=[4, 4]", ["[4, 4]", "do not decrease"]),
        ("distill", "method.steps=[8, 3]", ["8 to 3", "use one of 4, 2, 1"]),
        ("distill", "method.steps=[0]", ["0 steps", "Use one of 1, 2, 4"]),
        ("distill", "method.steps=[-4]", ["steps", "-4"]),
        ("distill", "method.steps=[6, 3]", ["6 steps", "1024 time steps", "1, 2, 4, 8, 16, 32"]),
        ("distill", "method.substeps=0", ["method.substeps is 0"]),
        ("distill", "method.guidance=2", ["guidance", "use guidance 1"]),
        ("distill", "method.eta=0.5", ["eta", "sampler is ddim", "set sampler: ancestral"]),
        (
            "distill",
            "method.name=progresive",
            ["method 'progresive' is unknown", "denoising, dmd2, f_distill, feature", "progressive"],
        ),
        (
            "distill",
            "method=[{steps: [4, 2]}, {steps: [2]}]",
            ["2-steps-progressive", "its own 2 steps"],
        ),
        ("distill", "teacher.null_label=3", ["null_label 3", "none"]),
        ("distill", "teacher.train=train.yaml", ["teacher needs either path", "or train"]),
        ("distill", "teacher={train: missing.yaml}", ["missing.yaml", "cannot be read"]),
        ("distill", "training.micro_batches=3", ["batch_size 4", "3 micro-batches"]),
        ("distill", "evaluation={features: no.such.Network}", ["feature network 'no.such.Network'"]),
    ],
)
def test_invalid_config_values(refused, command, override, says):
    refused(command, f"{command}.yaml", override, says=says)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("method.steps=[8, 4, 3]", ["4 to 3", "use one of 2, 1"]),
        ("method.steps=[16, 8]", ["16 steps", "1000 time steps", "1, 2, 4, 5, 8, 10, 20, 25, 40, 50"]),
        ("method.steps=[5]", None),
        ("method.steps=[1000]", ["2000 steps", "1000 time steps"]),
    ],
)
def test_steps_of_a_teacher_of_1000(refused, cli, override, says):
    """Stage 0 of an epsilon teacher has twice the steps of the first student: 10 of them fit, 2000 do not."""
    if says is None:
        assert cli("distill", "distill.yaml", "teacher.path=linear", override).code == 0
    else:
        refused("distill", "distill.yaml", "teacher.path=linear", override, says=says)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("method.steps=[6, 3]", ["6 steps", "1024 time steps"]),
        ("method=[{steps: [4]}, {steps: [4]}]", ["stage 4-steps-progressive", "its own 4 steps"]),
        ("data={kind: folder, path: images, size: 8}", ["1x8x8", "3x8x8"]),
        ("evaluation={features: no.such.Network}", ["feature network 'no.such.Network'"]),
    ],
)
def test_a_mistake_is_reported_before_the_teacher_is_trained(refused, here, image_folder, override, says):
    """The teacher's config is enough to tell that the steps do not fit, hours before it is trained."""
    image_folder(here, channels=3)
    write(here / "both.yaml", {**DISTILL, "teacher": {"train": "train.yaml"}})
    refused("distill", "both.yaml", override, says=says)


def test_guidance_of_a_labelled_teacher_needs_its_null_label(refused):
    args = ["distill", "distill.yaml", "teacher.path=labelled", "method.guidance=2"]
    refused(*args, says=["guidance", "null_label"])
    refused(*args, "teacher.null_label=10", says=["null_label 10", "10"])


def test_a_method_without_steps(cli, here):
    """Denoising trains no student for a number of steps; the run must still end without a traceback."""
    code, _, err = cli("distill", "distill.yaml", "method={name: denoising, updates: 1}")
    assert code in (0, 2) and len(err.splitlines()) == (code == 2)


# the folder of a run --------------------------------------------------------------------------------------


def test_the_folder_of_another_run(refused, cli):
    assert cli("train", "train.yaml").code == 0
    other = ["runs/teacher", "another config", "another out"]
    refused("train", "train.yaml", "seed=1", says=[*other, "seed was 0, now 1"])
    refused("train", "train.yaml", "denoising.gamma=2", says=["denoising.gamma was 5.0, now 2.0"])
    refused("distill", "distill.yaml", "out=runs/teacher", says=["runs/teacher", "another config"])


def test_a_mistake_does_not_claim_the_folder(refused, cli):
    """A corrected command starts without a folder having to be removed first."""
    refused("train", "train.yaml", "prediction=epsilon", says="epsilon")
    assert cli("train", "train.yaml").code == 0


def test_a_run_that_another_process_holds(refused, here):
    holder = (
        "import sys; from filelock import FileLock; lock = FileLock('runs/teacher/.lock');"
        "lock.acquire(timeout=0); print('held', flush=True); sys.stdin.read()"
    )
    (here / "runs" / "teacher").mkdir(parents=True)
    command = [sys.executable, "-c", holder]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=here
    ) as other:
        assert other.stdout.readline() == "held\n"
        refused("train", "train.yaml", says=["runs/teacher is in use", "wait for it, or use another out"])


# pipelines ------------------------------------------------------------------------------------------------


def remove(*names: str) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return harm


def put(name: str, content: bytes | str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(
        content.encode() if isinstance(content, str) else content
    )


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))

    return harm


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def torn(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        content = load_file(folder / WEIGHTS)
        change(content)
        save_file(content, folder / WEIGHTS, metadata={"format": "pt"})

    return harm


def network(**changes: Any) -> Callable[[Path], None]:
    """A different network, intact in itself."""

    def harm(folder: Path) -> None:
        config = dict(diffusers.UNet2DModel.load_config(folder / "unet"))
        diffusers.UNet2DModel.from_config({**config, **changes}).save_pretrained(folder / "unet")

    return harm


def pickled(folder: Path) -> None:
    content = load_file(folder / WEIGHTS)
    torch.save(content, folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def pickled_beside_another(folder: Path) -> None:
    """There are safetensors, but not those that would be loaded: the pickled ones stay unopened."""
    (folder / "unet" / "other.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    pickled(folder)


def no_index(folder: Path) -> None:
    """Nor a network that could be opened alone."""
    (folder / INDEX).unlink()
    shutil.rmtree(folder / "unet")


INDEX, CONFIG, SCHEDULER = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"
UNREADABLE = ["plain/unet", "cannot be read"]
HARMED = {
    "no index": (no_index, ["no model_index.json"]),
    "torn index": (put(INDEX, '{"_class_name": "DDIM'), [INDEX, "complete?"]),
    "empty index": (put(INDEX, ""), [INDEX, "complete?"]),
    "index is a list": (put(INDEX, "[1]"), [INDEX, "not hold a JSON object"]),
    "index in another encoding": (put(INDEX, b'{"a": "\xff"}'), [INDEX, "complete?"]),
    "no class": (put(INDEX, "{}"), ["supported are", "DDPMPipeline, DDIMPipeline, ConsistencyModelPipeline"]),
    "another family": (
        edit(INDEX, _class_name="LDMSuperResolutionPipeline"),
        [
            "LDMSuperResolutionPipeline",
            "supported are",
            "DDPMPipeline, DDIMPipeline, ConsistencyModelPipeline",
        ],
    ),
    "another network": (
        edit(INDEX, unet=["diffusers", "UNet2DConditionModel"]),
        ["UNet2DConditionModel", "supported is UNet2DModel"],
    ),
    "no network in the index": (edit(INDEX, unet=[None, None]), ["supported is UNet2DModel"]),
    "time by fourier": (network(time_embedding_type="fourier"), ["'fourier'", "positional"]),
    "other channels out": (network(out_channels=3), ["out_channels", "3"]),
    "no weights": (remove(WEIGHTS), [WEIGHTS, "safetensors"]),
    "no network's folder": (remove("unet"), ["safetensors"]),
    "no network's config": (remove(CONFIG), UNREADABLE),
    "torn network's config": (put(CONFIG, '{"sample_si'), UNREADABLE),
    "a value that is none": (edit(CONFIG, block_out_channels="x"), UNREADABLE),
    "pickled": (pickled, ["never opened", "convert", "save_pretrained(folder, safe_serialization=True)"]),
    "pickled, beside others": (pickled_beside_another, ["plain/unet", "never opened", "convert"]),
    "torn weights": (torn, [*UNREADABLE, "complete?"]),
    "empty weights": (put(WEIGHTS, b""), UNREADABLE),
    "weights that are none": (put(WEIGHTS, b"\x80\x04pickle" * 9), UNREADABLE),
    "git-lfs pointer": (put(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), UNREADABLE),
    "a tensor missing": (tensors(lambda t: t.pop("conv_in.bias")), ["conv_in.bias"]),
    "a tensor of another shape": (
        tensors(lambda t: t.update({"conv_in.bias": torch.ones(3)})),
        [*UNREADABLE, "conv_in.bias"],
    ),
    "no scheduler": (remove("scheduler"), ["scheduler_config.json", "save_pretrained"]),
    "torn scheduler": (put(SCHEDULER, '{"beta_'), ["scheduler_config.json"]),
    "unknown scheduler": (
        edit(INDEX, scheduler=["diffusers", "MyScheduler"]),
        ["'MyScheduler'", "DDIMScheduler"],
    ),
    "flow scheduler": (
        edit(INDEX, _class_name="DDPMPipeline", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]),
        ["FlowMatchEulerDiscreteScheduler", "supported are"],
    ),
    "unknown betas": (edit(SCHEDULER, beta_schedule="linaer"), ["linaer"]),
    "unknown prediction": (edit(SCHEDULER, prediction_type="score"), ["'score'", "epsilon, v_prediction"]),
    "epsilon at zero terminal SNR": (
        edit(SCHEDULER, prediction_type="epsilon"),
        ["epsilon", "zero terminal SNR", "use prediction_type v_prediction"],
    ),
    "torn card": (put("diffkd.json", '{"steps": 4'), ["diffkd.json", "complete?"]),
}


@pytest.mark.parametrize("name", HARMED)
def test_a_pipeline_that_cannot_be_used(refused, here, name):
    harm, says = HARMED[name]
    harm(here / "plain")
    refused(*sample("plain", "--steps", 2), says=says)


@pytest.mark.parametrize("name", ["no index", "another family", "pickled", "torn weights"])
def test_a_teacher_that_cannot_be_used(refused, here, name):
    harm, says = HARMED[name]
    harm(here / "plain")
    refused("distill", "distill.yaml", says=says)


@pytest.mark.parametrize(
    "path", ["/no/such/pipeline", "./missing", "train.yaml", "plain/model_index.json", "a/b/c"]
)
def test_a_path_that_is_not_a_pipeline(refused, path):
    refused(*sample(path), says=[path, "neither a pipeline's folder nor a hub id"])
    refused("distill", "distill.yaml", f"teacher.path='{path}'", says=[path, "check the path"])


def test_pickled_weights_beside_safe_ones_are_not_opened(cli, here):
    (here / "plain" / "unet" / "diffusion_pytorch_model.bin").write_bytes(
        b"not opened, else this were an error"
    )
    assert cli(*sample("plain", "--steps", 1)).code == 0


# the hub --------------------------------------------------------------------------------------------------


def http_error(kind: type[Exception], message: str) -> Exception:
    """Without any network, whichever HTTP library the hub's client uses."""
    if kind is HfHubHTTPError.__bases__[0]:
        return kind(message)
    return kind(message, response=Mock(headers={}))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (lambda: http_error(RepositoryNotFoundError, "404 Client Error.\n\nNot found"), "404 Client Error."),
        (
            lambda: LocalEntryNotFoundError("offline, and nothing in the cache"),
            "offline, and nothing in the cache",
        ),
        (lambda: OSError("no space left on device"), "no space left on device"),
        (lambda: http_error(HfHubHTTPError.__bases__[0], "Name or service not known"), "service not known"),
        (lambda: TimeoutError(), "could not be downloaded"),
    ],
    ids=["404", "offline", "disk", "network", "no words"],
)
def test_a_hub_id_that_cannot_be_downloaded(refused, monkeypatch, error, reason):
    def download(*args: Any, **kwargs: Any) -> str:
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    refused(*sample("nobody/nothing"), says=["nobody/nothing", reason, "check the name"])
    refused(
        "distill", "distill.yaml", "teacher.path=nobody/nothing", says=["nobody/nothing", "give its folder"]
    )


def test_a_hub_id_is_fetched_without_pickles_and_loads(cli, here, monkeypatch):
    asked = []

    def download(name: str, **kwargs: Any) -> str:
        asked.append((name, kwargs["allow_patterns"]))
        return str(here / "plain")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    code, _, err = cli(*sample("somebody/something", "--steps", 2))
    assert (code, err) == (0, "")
    assert [name for name, _ in asked] == ["somebody/something"]
    wanted = ["merges.txt", "spiece.model", "unet/config.json", WEIGHTS, Path(WEIGHTS).name]
    left = ["unet/x.bin", "x.ckpt", "x.pt", "x.pkl", "single-file.safetensors"]
    for names, told in ((wanted, True), (left, False)):
        assert all(any(fnmatch.fnmatch(name, one) for one in asked[0][1]) == told for name in names)


def test_a_repository_that_is_not_a_pipeline(refused, here, monkeypatch):
    (here / "empty").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kwargs: str(here / "empty"))
    refused(*sample("somebody/text"), says=["model_index.json"])


# sampling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "classes", ["", "x", "1,,2", "1-", "-1", "1-x", "9-0", "9-0,3", "1.5", "0x3", "²", "balanced,3", "1-2-3"]
)
def test_invalid_classes(refused, classes):
    refused(*sample("labelled", "--steps", 2), f"--classes={classes}", says=["--classes", repr(classes)])


@pytest.mark.parametrize("classes", ["10", "0-10", "3,99"])
def test_labels_out_of_range(refused, classes):
    refused(*sample("labelled", "--steps", 2, "--classes", classes), says=["out of range", "0 to 9"])


def test_a_label_beyond_any_integer(refused):
    label = "9" * 20
    refused(*sample("labelled", "--steps", 2, "--classes", label), says=[label, "out of range"])


def test_labels_of_an_unconditional_model(refused):
    refused(*sample("plain", "--steps", 2, "--classes", "0-3"), says=["unconditional", "leave them out"])


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x", "", "xla", "meta"])
def test_an_unknown_device(refused, device):
    if torch.cuda.is_available() and torch.cuda.device_count() > 99:
        pytest.skip("there is a cuda:99")
    refused(
        "sample",
        "plain",
        "--out",
        "drawn",
        "--steps",
        1,
        "--device",
        device,
        says=["--device", repr(device), "cpu"],
    )


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], ["plain", "no step count", "--steps"]),
        (["--steps", 2, "--sampler", "eular"], ["'eular'", "ddim, heun, dpmpp_2m, ancestral"]),
        (["--steps", 2, "--eta", 0.5], ["eta", "ancestral"]),
        (["--steps", 2, "--sampler", "heun", "--eta", 0.5], ["eta", "ancestral"]),
        (["--steps", 2, "-w", 2], ["guidance", "--null-label"]),
        (["--steps", 2, "-w", "nan"], ["guidance"]),
        (["--steps", 2, "--seed", 2**64], ["seed", str(2**64)]),
    ],
)
@pytest.mark.parametrize("out", ["drawn", "new/drawn", "new/drawn.npz"])
def test_options_of_sample(refused, out, args, says):
    refused("sample", "plain", "--out", out, "-n", 2, "--device", "cpu", *args, says=says)


def test_existing_images_are_not_overwritten(refused, cli, here):
    for out in ("drawn", "drawn.npz"):
        args = ["sample", "plain", "--steps", 1, "-n", 2, "--out", out]
        assert cli(*args).code == 0
        refused(*args, "--seed", 5, says=[out, "images of other settings (seed was 0, now 5)", "--overwrite"])
        refused(
            *args[:-4], "-n", 1, "--out", out, says=["of these settings, and 1 were requested", "--overwrite"]
        )
        before = tree(here)
        assert cli(*args) == (0, f"all 2 images exist already: {out}\n", "") and tree(here) == before
        assert cli(*args, "--seed", 5, "--overwrite").code == 0
        after = tree(here)
        assert after.keys() == before.keys() and after != before


def test_an_existing_grid_is_not_overwritten(refused, here):
    """The grid beside an .npz counts as well."""
    (here / "drawn.grid.png").write_bytes(b"of another run")
    args = ["sample", "plain", "--steps", 1, "-n", 2, "--out", "drawn.npz"]
    refused(*args, says=["drawn.grid.png", "already exists", "--overwrite"])


def test_an_empty_folder_is_used(cli, here):
    (here / "drawn").mkdir()
    assert cli(*sample("plain", "--steps", 1)).code == 0
    assert len(list((here / "drawn").iterdir())) == 3


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize(
    "out", ["plain", ".", "train.yaml", "plain/model_index.json/x", "train.yaml/x.npz", "f.npz"]
)
def test_overwrite_replaces_only_sampled_images(refused, here, out, overwrite):
    """--overwrite is for images that `diffkd sample` wrote, not for any folder that a typo may name."""
    (here / "f.npz").mkdir()
    refused("sample", "plain", "--steps", 1, "-n", 2, "--out", out, *overwrite, says=out)


# data -----------------------------------------------------------------------------------------------------


def folder(**fields: Any) -> dict[str, Any]:
    return {"kind": "folder", "path": "images", "size": 8, "channels": 1, **fields}


def with_data(here: Path, command: str, data: dict[str, Any]) -> tuple[str, Path]:
    content = TRAIN if command == "train" else DISTILL
    return command, write(here / "data.yaml", {**content, "data": data})


@pytest.mark.parametrize("command", ["train", "distill"])
def test_folders_without_images(refused, here, command):
    run = with_data(here, command, folder())
    refused(*run, says=["images is not a folder", "give a folder of images"])
    (here / "images" / "a").mkdir(parents=True)
    refused(*run, says=["images holds no images", ".png"])
    write(here / "images" / "a" / "notes.txt", "words")
    refused(*run, says=["images holds no images"])
    refused(*with_data(here, command, folder(path="train.yaml")), says=["train.yaml is not a folder"])


def test_images_that_are_too_small(refused, cli, here, image_folder):
    image_folder(here, size=(12, 6), count=1)
    refused(
        *with_data(here, "train", folder()), says=["000.png is 12x6", "data.size 8", "data.upscale: true"]
    )
    assert cli(*with_data(here, "train", folder(upscale=True))).code == 0


def test_images_that_cannot_be_read(refused, cli, here, image_folder):
    root = image_folder(here, count=101)
    (root / "017.png").write_bytes(b"\x89PNG and no more")
    run = with_data(here, "train", folder())
    code, _, err = cli(*run, "out=runs/one")
    assert code == 0
    assert [("017.png" in line, line.startswith("diffkd: ")) for line in err.splitlines()] == [(True, True)]
    (root / "050.png").write_bytes((root / "050.png").read_bytes()[:40])
    message = refused(*run, says=["2 of 101", "images", "remove or repair"], lines_before=2)
    assert "cannot be read" in message


def test_data_of_another_shape_than_the_teacher(refused, here, image_folder):
    image_folder(here, size=(16, 16))
    refused(*with_data(here, "distill", folder(size=16)), says=["1x8x8", "1x16x16", "data.size"])
    refused(*with_data(here, "distill", folder(channels=3)), says=["1x8x8", "3x8x8", "data.channels"])


def test_data_whose_labels_do_not_fit_the_teacher(refused, here, image_folder):
    image_folder(here, classes=[f"{i:02d}" for i in range(11)], count=1)
    distil = with_data(here, "distill", folder())
    refused(*distil, "teacher.path=labelled", says=["label 10", "out of range", "10 classes"])
    refused(*distil, "teacher.path=labelled", "data.labelled=false", says=["class-conditional", "no labels"])


def test_labelled_data_with_an_unconditional_teacher_works(cli, here, image_folder):
    image_folder(here, classes=["a", "b"], count=2)
    assert cli(*with_data(here, "distill", folder())).code == 0


def hub(**fields: Any) -> dict[str, Any]:
    return {"kind": "datasets", "path": "set", "size": 8, "channels": 1, **fields}


def save_set(path: Path, labels: list[int] | None = None) -> None:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(4)]
    content: dict[str, Any] = {"image": images, "words": list("abcd")}
    kinds: dict[str, Any] = {"image": datasets.Image(), "words": datasets.Value("string")}
    if labels is not None:
        content["label"], kinds["label"] = labels, datasets.ClassLabel(num_classes=3)
    datasets.Dataset.from_dict(content, datasets.Features(kinds)).save_to_disk(path)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"path": "/no/such/set"}, ["/no/such/set", "cannot be read"]),
        ({"path": "./missing"}, ["./missing", "cannot be read"]),
        ({"image": "photo"}, ["no image column 'photo'", "it has image, words"]),
        ({"image": "words"}, ["set", "'words'"]),
        ({"label": "sort"}, ["no column 'sort'", "it has image, words"]),
        ({"label": "words"}, ["set", "'words'"]),
    ],
)
def test_datasets_that_do_not_exist(refused, here, fields, says):
    save_set(here / "set")
    refused(*with_data(here, "train", hub(**fields)), says=says)


def test_a_dataset_without_images(refused, here):
    datasets.Dataset.from_dict({"words": ["a"]}).save_to_disk(here / "set")
    refused(*with_data(here, "train", hub()), says=["image column", "words"])


def test_a_split_that_does_not_exist(refused, here):
    save_set(here / "one")
    datasets.DatasetDict({"test": datasets.load_from_disk(here / "one")}).save_to_disk(here / "set")
    refused(*with_data(here, "train", hub()), says=["split train", "test"])


def test_a_hub_dataset_that_cannot_be_downloaded(refused, here, monkeypatch):
    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub\nmore words")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    says = ["nobody/nothing", "Couldn't reach 'nobody/nothing' on the Hub"]
    refused(*with_data(here, "train", hub(path="nobody/nothing")), says=says)


def test_hidden_labels(refused, here):
    """-1 is the label of images without one; no class has that number."""
    save_set(here / "set", labels=[0, -1, 1, 2])
    refused(*with_data(here, "train", hub()), says=["set", "-1"])
    refused(*with_data(here, "distill", hub()), "teacher.path=labelled", says=["set", "-1"])


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_an_unwritable_folder(refused, here):
    (here / "runs").mkdir(mode=0o500)
    refused("train", "train.yaml", says=["runs"])
