"""Runs that are stopped, that run out of disk, or that resume with another config: nothing is lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from diffkd.cli.options import duration
from diffkd.errors import UserError
from diffkd.runs import session
from diffkd.runs.session import Session
from diffkd.training import trainer
from tests.refusals import refuse
from tests.runs.conftest import STOPPED
from tests.runs.tiny import CONFIG, assert_same_runs, network, records, same, signal_at, write
from tests.waiting import LAUNCHED, ONE_THREAD, wait_for

FOREVER = ["method.updates=40", "training.checkpoint_every=1000", "training.micro_batches=2"]
STAGE, UPDATE = "4-steps", 3


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_teacher):
    """distill.yaml is the run of the fixture `unstopped`."""
    monkeypatch.chdir(tmp_path)
    write("distill.yaml", STOPPED, teacher={"path": str(tiny_teacher)})
    return tmp_path


# a limit of time --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("50m", 3000), ("1h30m", 5400), ("2d", 172800), ("1d2h3m4s", 93784)]
)
def test_durations(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "50", "m", "1.5h", "-5m", "5m1h", "50 m", "٣m"])
def test_what_is_not_a_duration(text):
    with pytest.raises(UserError, match="is not a time; give one such as 50m"):
        duration(text)


def test_a_run_whose_time_is_up_saves_and_ends_well(here, cli, monkeypatch, unstopped):
    clock = [0.0]
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + clock[0]))
    with monkeypatch.context() as patch:
        signal_at(patch, STAGE, UPDATE, call=lambda: clock.append(clock.pop() + 3600))
        code, _, err = cli("distill", "distill.yaml", "out=run", "--stop-after", "50m")
    assert code == 0
    assert err == "diffkd: stopped, as the time is up; a checkpoint is saved, the same command resumes it\n"
    assert not (here / "run/students").exists()
    clock[0] = 0.0
    code, _, err = cli("distill", "distill.yaml", "out=run", "--stop-after", "50m")
    assert (code, err) == (0, "")
    assert_same_runs(unstopped, here / "run")


def test_no_duration_is_taken_from_a_clock_that_can_be_set():
    """By time synchronisation, or in a machine that was saved and restored."""
    package = Path(session.__file__).parents[1]
    wall = ("time.time(", "time.time_ns(", "datetime.now(", "utcnow(")
    assert not [
        str(p) for p in package.rglob("*.py") for word in wall if word in p.read_text(encoding="utf-8")
    ]


def test_a_time_that_is_not_one_is_refused(here, cli):
    refuse(cli, here, "distill", "distill.yaml", "--stop-after", "soon", says=["--stop-after 'soon'", "50m"])


def test_signals_that_come_twice(here, cli, monkeypatch, unstopped):
    """As from a launcher that forwards what its processes have already received, in the middle of saving."""

    def saving(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        save(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    save = trainer.save
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save", saving)
        signal_at(patch, STAGE, UPDATE, send=[signal.SIGTERM] * 2)
        code, _, err = cli("distill", "distill.yaml", "out=run")
    assert code == 130 and "a checkpoint is saved" in err
    assert len(list((here / "run/checkpoints").iterdir())) == 1
    assert cli("distill", "distill.yaml", "out=run").code == 0
    assert_same_runs(unstopped, here / "run")


def test_a_second_interrupt_ends_it_at_once(here, cli, monkeypatch, own_signals):
    """Without the end of the update, and without a checkpoint."""
    with monkeypatch.context() as patch:
        signal_at(patch, STAGE, UPDATE, send=[signal.SIGINT] * 2)
        code, _, err = cli("distill", "distill.yaml", "out=run")
    assert (code, err) == (130, "")
    assert '"update": 4' not in (here / "run/log.jsonl").read_text()
    assert not list((here / "run/checkpoints").glob("*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_in_an_evaluation(here, cli, monkeypatch):
    """There is nothing of one to save: it starts again, and measures the same."""
    evaluation = {"samples": 48, "batch_size": 8, "teacher_steps": [4]}
    method = {**CONFIG["method"], "steps": [2], "updates": 1}
    content = yaml.safe_load((here / "distill.yaml").read_text())
    write("distill.yaml", content, method=method, evaluation=evaluation)
    assert cli("distill", "distill.yaml", "out=whole").code == 0
    calls = [0]
    image_bar = Session.image_bar

    @contextlib.contextmanager
    def interrupting(self, title, total):
        with image_bar(self, title, total) as on_images:

            def interrupt(count):
                calls[0] += 1
                if calls[0] in (8, 14):
                    os.kill(os.getpid(), signal.SIGTERM if calls[0] == 8 else signal.SIGINT)
                on_images(count)

            yield interrupt

    monkeypatch.setattr(Session, "image_bar", interrupting)
    for _ in range(2):
        code, _, err = cli("distill", "distill.yaml", "out=parts")
        assert code == 130 and err == "diffkd: interrupted; the same command resumes it\n"
    assert cli("distill", "distill.yaml", "out=parts").code == 0
    assert_same_runs(here / "whole", here / "parts")
    whole, parts = (
        [(r["model"], r["steps"], r["fid"]) for r in records(here / name)] for name in ("whole", "parts")
    )
    assert whole == parts


# launchers


@pytest.mark.slow
def test_two_processes_whose_time_is_up(here, launched):
    """Their clocks are never quite the same: both end well, and so does the launcher."""
    args = ["distill", "distill.yaml", *FOREVER, "method.updates=2000", "--stop-after", "1s"]
    first = subprocess.run([*LAUNCHED, *args], env=ONE_THREAD, capture_output=True, text=True)
    for done in (first, launched(2, *args)):
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("stopped, as the time is up; a checkpoint is saved") == 1, done.stderr


@pytest.mark.slow
def test_a_launcher_that_is_told_to_stop(here, launched):
    """As a queue does it: SIGTERM to what started the processes."""
    args = ["distill", "distill.yaml", *FOREVER]
    assert launched(2, *args, "out=runs/whole").returncode == 0
    process = subprocess.Popen(
        [*LAUNCHED, *args, "out=runs/parts"], env=ONE_THREAD, stderr=subprocess.PIPE, text=True
    )
    wait_for(process, here / "runs/parts/log.jsonl", '"4-steps", "stage_index": 0, "update": 20')
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode and err.count("interrupted; a checkpoint is saved") == 1, err
    saved = [p.name for p in (here / "runs/parts/checkpoints").iterdir()]
    assert len(saved) == 1 and "stage-00-update-00000" in saved[0]
    assert launched(2, *args, "out=runs/parts").returncode == 0
    assert_same_runs(here / "runs/whole", here / "runs/parts")


# a full disk ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_disk_that_fills_up(here, cli, disk, unstopped):
    """The run stops with one line, and with more room it ends as if nothing had happened."""
    overrides = ["training.checkpoint_every=2", "training.keep=2"]
    one = sum(p.stat().st_size for p in next((unstopped / "checkpoints").iterdir()).iterdir())
    place = disk(f"{int(one * 2.6) // 1024}k")
    code, out, err = cli("distill", "distill.yaml", *overrides, f"out={place / 'run'}")
    assert code == 1 and len(err.splitlines()) == 1
    assert "the disk is full (" in err and "same command resumes" in err and "make room" in err
    assert not [p for p in place.rglob(".*") if p.suffix == ".tmp"]
    assert list((place / "run/checkpoints").iterdir()) and "Traceback" not in err
    with contextlib.suppress(OSError), (place / "filling").open("ab") as stream:
        while True:
            stream.write(b"0" * 4096)
            stream.flush()
    code, out, err = cli("distill", "distill.yaml", *overrides, f"out={place / 'run'}")
    assert code == 1 and len(err.splitlines()) == 1 and "the disk is full" in err, err
    disk("100m")
    assert cli("distill", "distill.yaml", *overrides, f"out={place / 'run'}").code == 0
    assert_same_runs(unstopped, place / "run")


# another config ---------------------------------------------------------------------------------------


def test_a_harmless_change_half_way(here, cli, monkeypatch, unstopped):
    with monkeypatch.context() as patch:
        signal_at(patch, "1-steps", 4, send=[signal.SIGTERM])
        assert cli("distill", "distill.yaml", "training.log_every=4", "out=run").code == 130
    changed = ["distill", "distill.yaml", "training.log_every=1", "training.checkpoint_every=3", "out=run"]
    refuse(cli, here, *changed, says=["training.log_every was 4, now 1", "--allow"])
    refuse(cli, here, *changed, "seed=9", "--allow", says=["seed was 0, now 9", "use another out"])
    code, _, err = cli(*changed, "--allow")
    assert code == 0 and "another config" in err and len(err.splitlines()) == 1
    for name in ("4-steps", "1-steps"):
        assert same(network(unstopped / "students" / name), network(here / "run/students" / name))
    assert yaml.safe_load((here / "run/config.yaml").read_text())["training"]["log_every"] == 1


def test_another_teacher_or_other_images_half_way(here, cli, image_folder, make_pipeline):
    """Under the same names: a run that resumed with them would be another one."""
    image_folder(here, name="images", classes="ab", size=(8, 8))
    make_pipeline(here, name="teacher", classes=2)
    args = [
        "distill", "distill.yaml", "out=run", "method.updates=1", "method.steps=[4]",
        "data={kind: folder, path: images, size: 8, channels: 1}", "teacher={path: teacher}",
    ]  # fmt: skip
    assert cli(*args).code == 0
    (here / "images").rename(here / "before")
    image_folder(here, name="images", classes="ab", size=(8, 8), seed=1)
    refuse(cli, here, *args, says=["the data of run has changed since the run began"])
    shutil.rmtree(here / "images")
    (here / "before").rename(here / "images")
    scheduler = here / "teacher/scheduler/scheduler_config.json"
    content = scheduler.read_text()
    scheduler.write_text(content.replace("squaredcos_cap_v2", "linear"))
    refuse(cli, here, *args, says=["the teacher of run has changed"])
    scheduler.write_text(content)
    shutil.rmtree(here / "teacher")
    make_pipeline(here, name="teacher", classes=2, seed=1)
    refuse(cli, here, *args, says=["the teacher of run has changed"])


# accelerate's configs ---------------------------------------------------------------------------------


CONFIGS = sorted((Path(__file__).parents[2] / "configs/accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(path):
    from accelerate.commands.config.config_args import load_config_from_file

    known = load_config_from_file(str(path))
    kinds = {"one-gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed-zero2": "DEEPSPEED"}
    assert known.distributed_type == kinds[path.stem]
    if path.stem == "fsdp2":
        assert known.fsdp_config["fsdp_version"] == 2
    if path.stem == "deepspeed-zero2":
        assert known.deepspeed_config["zero_stage"] == 2
    assert len(CONFIGS) == len(kinds)
