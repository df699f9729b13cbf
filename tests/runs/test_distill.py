"""Training and distilling, whole, at a tiny size: through the command, as a user runs it."""

from __future__ import annotations

import gc
import json
import re
import signal
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
import torch
from PIL import Image

import diffkd
from diffkd.runs import session
from tests.runs.conftest import STOPPED
from tests.runs.tiny import (
    CONFIG,
    ROOT,
    TEACHER,
    assert_same_runs,
    log,
    network,
    records,
    same,
    signal_at,
    write,
)
from tests.waiting import ONE_THREAD, wait_for


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("teacher.yaml", TEACHER)
    write("distill.yaml", CONFIG)
    return tmp_path


@pytest.fixture
def from_teacher(tiny_teacher):
    """The override that takes the teacher trained for all tests."""
    return f"teacher={{path: {tiny_teacher}}}"


def test_images_to_students_in_one_command(here, cli):
    """The run folder, its numbers with their protocol, and that the same command again changes nothing."""
    code, out, err = cli("distill", "distill.yaml")
    assert (code, err) == (0, "")
    run = here / "runs/students"
    assert sorted(p.name for p in (run / "students").iterdir()) == ["1-steps", "2-steps", "4-steps"]
    measured = records(run)
    assert [(r["role"], r["steps"]) for r in measured] == [  # the teacher where teacher_steps says, alone
        ("teacher", 8), *(("student", n) for n in (4, 2, 1))
    ]  # fmt: skip
    for record in measured:
        assert f"{record['fid']:.2f}" in out and record["fid"] > 0
        protocol = record["protocol"]
        assert protocol["samples"] == 32 and protocol["reference"]["count"] == 1797
        assert (
            protocol["nfe"] == record["steps"] == protocol["steps"]
            and len(protocol["features"]["sha256"]) == 64
        )
        assert protocol["versions"]["torch"] == version("torch") and protocol["sampler"] == "ddim"
    for n in (4, 2, 1):
        card = json.loads((run / f"students/{n}-steps/diffkd.json").read_text())
        assert card["steps"] == n and card["metrics"] == [r for r in measured if r["model"] == f"{n}-steps"]
        with Image.open(run / f"samples/{n}-steps.png") as grid:
            assert grid.size == (270, 270)  # 8 tiles of 32 and the gaps between them
    stages = {r["stage"]: r for r in log(run)}
    assert {name: r["updates"] for name, r in stages.items()} == {"4-steps": 3, "2-steps": 6, "1-steps": 6}
    assert "not comparable with FID by Inception" in out and "report.html" in out
    assert "<svg" in (run / "report.html").read_text()
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "report.html"}
    assert cli("distill", "distill.yaml").code == 0
    assert before == {p: p.read_bytes() for p in before}


@pytest.mark.parametrize("guidance", [1, 3])
def test_the_teacher_that_is_measured_is_drawn_once(here, cli, drawn_steps, from_teacher, guidance):
    """For its own numbers and for the students that are compared with it."""
    overrides = [
        "evaluation={samples: 20, batch_size: 8, teacher_steps: [9, 7], metrics: [fid, agreement]}",
        from_teacher, "method.steps=[4,1]", f"method.guidance={guidance}",
    ]  # fmt: skip
    code, _, err = cli("distill", "distill.yaml", *overrides)
    assert (code, err) == (0, "")
    pictures = 64
    expected = {9: 20 + pictures, 7: 20, 4: 20 + pictures, 1: 20 + pictures}
    assert {n: drawn_steps.count(n) for n in expected} == expected
    found = records(here / "runs/students")
    assert [r["psnr"] is None for r in found] == [True, False, False, False]


def test_mistake_the_first_teacher_in_every_stage(here, cli, monkeypatch, tiny_teacher, from_teacher):
    """Each stage's teacher, and its student's start, is the student that the stage before saved."""
    seen = []
    run_stage = session.run_stage

    def watched(accelerator, method, stage, nets, *rest, **options):
        if "teacher" in nets:
            assert not any(p.requires_grad for p in nets["teacher"].parameters())
            seen.append(
                [
                    {k: v.clone() for k, v in nets[n].network.state_dict().items()}
                    for n in ("teacher", "student")
                ]
            )
        run_stage(accelerator, method, stage, nets, *rest, **options)

    monkeypatch.setattr(session, "run_stage", watched)
    assert cli("distill", "distill.yaml", from_teacher, "evaluation=null", "pictures=0").code == 0
    students = here / "runs/students/students"
    sources = [tiny_teacher, students / "4-steps", students / "2-steps"]
    for (teacher, start), source in zip(seen, sources, strict=True):
        assert same(teacher, network(source)) and same(start, teacher)
    assert not same(network(students / "4-steps"), network(students / "1-steps"))


@pytest.mark.slow
def test_an_epsilon_teacher_with_guidance(here, cli):
    overrides = [
        "schedule={beta_schedule: linear, num_train_timesteps: 1000, zero_terminal_snr: false}",
        "prediction=epsilon",
        "denoising.weight=snr",
        "evaluation=null",
        "pictures=0",
    ]
    assert cli("train", "teacher.yaml", *overrides).code == 0
    code, out, err = cli(
        "distill",
        "distill.yaml",
        "teacher={path: runs/teacher/teacher}",
        "method.guidance=1.5",
        "method.steps=[5,1]",
        "method.sampler=heun",
        "evaluation=null",
        "pictures=0",
    )
    assert (code, err) == (0, "")
    students = here / "runs/students/students"
    assert sorted(p.name for p in students.iterdir()) == ["1-steps", "10-steps", "5-steps"]
    for n in (10, 5, 1):
        student = diffkd.load(students / f"{n}-steps")
        assert student.prediction == "v_prediction" and student.steps == n
        assert student.schedule.num_train_timesteps == 1000
    assert json.loads((students / "1-steps/diffkd.json").read_text())["guidance_baked_in"] == 1.5


STAGE, UPDATE = "1-steps", 7


def resumed(cli, out):
    assert cli("distill", "distill.yaml", f"out={out}").code == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_stopped_by_a_signal_ends_with_the_same_bits(
    here, cli, monkeypatch, unstopped, tiny_teacher, number
):
    write("distill.yaml", STOPPED, teacher={"path": str(tiny_teacher)})
    with monkeypatch.context() as patch:
        signal_at(patch, STAGE, UPDATE, send=[number])
        code, _, err = cli("distill", "distill.yaml", "out=run")
    assert code == 130 and err == "diffkd: interrupted; a checkpoint is saved, the same command resumes it\n"
    assert log(here / "run")[-1]["update"] == UPDATE + 1 and not (here / "run/students/1-steps").exists()
    resumed(cli, "run")
    assert_same_runs(unstopped, here / "run")


def test_a_killed_run_ends_with_the_same_bits(here, cli, launched, unstopped, tiny_teacher):
    write("distill.yaml", STOPPED, teacher={"path": str(tiny_teacher)})
    strike = (STAGE, UPDATE, int(signal.SIGKILL))
    done = launched(1, *strike, "distill", "distill.yaml", "out=run", module="tests.runs.killed")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert log(here / "run")[-1]["update"] == UPDATE  # the last checkpoint is two updates older
    resumed(cli, "run")
    assert_same_runs(unstopped, here / "run")


@pytest.mark.slow
def test_a_process_of_its_own_stopped_from_outside(here, cli, unstopped, tiny_teacher):
    """As a user starts it, and stops it with Ctrl-C wherever it is."""
    write("distill.yaml", STOPPED, teacher={"path": str(tiny_teacher)})
    process = subprocess.Popen(
        [sys.executable, "-m", "diffkd.cli", "distill", "distill.yaml", "out=run"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=ONE_THREAD,
    )  # fmt: skip
    wait_for(process, here / "run/log.jsonl", '"1-steps", "stage_index": 1, "update": 2')
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.startswith("diffkd: interrupted; a checkpoint is saved"), err
    resumed(cli, "run")
    assert_same_runs(unstopped, here / "run")


def allocated():
    """Bytes of all tensors that exist (those that a compiler traces with are of other types)."""
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    storages = [x.untyped_storage() for x in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.slow
def test_memory_holds_each_network_once(here, cli, monkeypatch):
    """Between two updates of any stage: teacher, student, its average and Adam's two moments, no more."""
    wide = "model={channels: [64, 64], norm_groups: 8}"
    assert cli("train", "teacher.yaml", "evaluation=null", "denoising.updates=1", wide).code == 0
    one = sum(x.numel() * x.element_size() for x in network(here / "runs/teacher/teacher").values())
    found = []
    real = session.run_stage

    def watched(*args, on_update, **options):
        def counted(done, record):
            gc.collect()
            found.append(allocated() / one)
            on_update(done, record)

        return real(*args, on_update=counted, **options)

    monkeypatch.setattr(session, "run_stage", watched)
    # measured with agreement, so that the first teacher is needed to the end
    overrides = [
        "teacher={path: runs/teacher/teacher}",
        "evaluation={samples: 4, batch_size: 4, teacher_steps: [2], metrics: [fid, agreement]}",
        "training.checkpoint_every=100",  # which is a copy more of each, on the host, while it is written
    ]
    gc.collect()
    others = allocated() / one
    assert cli("distill", "distill.yaml", *overrides).code == 0
    assert len(found) == 3 + 6 + 6
    assert max(found) - others < 5.5, (found, others)


@pytest.mark.slow
def test_two_processes_are_two_micro_batches(here, cli, launched, from_teacher):
    """The learning rate advances once per update, and the weights are the same."""
    overrides = [
        "evaluation={samples: 10, batch_size: 4, teacher_steps: [8], metrics: [fid, agreement]}",
        from_teacher,
        "training.micro_batches=2",
        "method.steps=[4,1]",
    ]
    assert cli("distill", "distill.yaml", *overrides, "out=runs/one").code == 0
    done = launched(2, "distill", "distill.yaml", *overrides, "out=runs/two")
    assert done.returncode == 0, done.stderr
    processes = [
        json.loads((here / f"runs/{n}/environment.json").read_text())["processes"] for n in ("one", "two")
    ]
    assert processes == [1, 2]
    measured = [records(here / f"runs/{n}") for n in ("one", "two")]
    assert [r["protocol"]["processes"] for r in measured[1]] == [2] * len(measured[0])
    for one, two in zip(*measured, strict=True):
        assert one["fid"] == pytest.approx(two["fid"], rel=1e-3)
        assert (one["psnr"] is None) == (two["psnr"] is None)
    for name in ("4-steps", "1-steps"):
        one, two = network(here / f"runs/one/students/{name}"), network(here / f"runs/two/students/{name}")
        difference = max((one[k] - two[k]).abs().max().item() for k in one)
        assert difference < 1e-5, difference
    rates = [[r["learning_rate"] for r in log(here / f"runs/{n}")] for n in ("one", "two")]
    assert rates[0] == rates[1] and len(rates[0]) == 3 + 6


def test_a_loss_that_is_not_finite(here, cli):
    code, out, err = cli(
        "train",
        "teacher.yaml",
        "evaluation=null",
        "denoising.learning_rate=1e30",
        "training.max_grad_norm=null",
        "denoising.updates=20",
    )
    assert code == 2 and len(err.splitlines()) == 1
    assert re.search(
        r"of network student in stage denoising became NaN or infinite at update \d+, noise level t = "
        r"[\d.e-]+ \(bin [\d.]+ to [\d.]+\), images \d+, .*; 3 updates in a row were skipped before",
        err,
    )
    assert not (here / "runs/teacher/teacher").exists()


@pytest.mark.slow
def test_a_folder_of_images_needs_no_change_of_code(here, cli):
    """16x16 RGB PNGs: a teacher and its students, by configs that differ from the digits' in `data` only."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from digits_folder import make

    assert make(here / "images") == 1797
    data = "data={kind: folder, path: images, size: 16, channels: 3}"
    assert cli("train", "teacher.yaml", data).code == 0
    assert cli("distill", "distill.yaml", data, "teacher={path: runs/teacher/teacher}").code == 0
    code, _, err = cli(
        "sample",
        "runs/students/students/1-steps",
        "-n",
        "10",
        "--classes",
        "0-9",
        "--out",
        "drawn",
        "--device",
        "cpu",
    )
    assert (code, err) == (0, "")
    pictures = []
    for i in range(10):
        with Image.open(here / f"drawn/{i:06d}.png") as picture:
            pictures.append(np.asarray(picture))
    assert all(p.shape == (16, 16, 3) for p in pictures) and np.std(pictures) > 5


HALVED = [f"{n}-steps" for n in (1000, 500, 250, 125, 25, 5, 1)]
CHAIN = ["method.0.updates=1", "method.1.updates=1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "options", "names"),
    [
        ("progressive", ["method.updates=1", "method.updates_v=1"], HALVED),
        ("dmd2", [*CHAIN, "training.micro_batches=1"], ["output", "1-steps"]),
        ("sid", CHAIN, ["output", "1-steps"]),
        ("ect", CHAIN, ["output", "2-steps", "1-steps"]),
        ("meanflow", CHAIN, ["output", "2-steps", "1-steps"]),
    ],
)
def test_the_cifar10_config_on_a_teacher_of_that_very_architecture(config, options, names, here, cli):
    """google/ddpm-cifar10-32 with random weights, saved as that repository is; an update a stage on CPU."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    network = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_num_groups=32,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == 35.7
    DDPMPipeline(network, DDPMScheduler(variance_type="fixed_large")).save_pretrained(here / "saved")
    root = here / "ddpm-cifar10-32"  # everything at the root, as there
    root.mkdir()
    (here / "saved/model_index.json").rename(root / "model_index.json")
    (here / "saved/scheduler/scheduler_config.json").rename(root / "scheduler_config.json")
    for file in (here / "saved/unet").iterdir():
        file.rename(root / file.name)
    import datasets

    rng = np.random.default_rng(0)
    rows = {"img": [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(8)], "label": [0] * 8}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(here / "cifar")
    code, out, err = cli(
        "distill",
        ROOT / f"configs/cifar10/{config}.yaml",
        f"teacher={{path: {root}}}",
        f"data.path={here / 'cifar'}",
        *options,
        "evaluation=null",
        "training.batch_size=2",
        "training.precision=float32",
        "pictures=0",
        "training.log_every=1",
    )
    assert (code, err) == (0, "")
    students = here / f"runs/cifar10-{config}/students"
    assert {p.name for p in students.iterdir()} == {*names}
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(students / "1-steps")
    assert pipeline.unet.num_parameters() == network.num_parameters()
    assert type(pipeline.scheduler).__name__ == (
        "DDIMScheduler" if config in ("progressive", "meanflow") else "LCMScheduler"
    )
