"""Runs that are told to stop, that find no room, or go on otherwise: nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from diffkd.cli.options import duration
from diffkd.errors import UserError
from diffkd.runs.session import Session
from tests.refusals import refuse
from tests.runs.test_distill import CONFIG, MEASURED, TEACHER, network, same
from tests.waiting import LAUNCHED, ONE_THREAD, wait_for

FOREVER = ["evaluation=null", "pictures=0", "method.steps=[4,1]", "training.checkpoint_every=1000"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A trained one, for all."""
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "teacher.yaml").write_text(yaml.safe_dump({**TEACHER, "evaluation": None, "pictures": 0}))
    command = [sys.executable, "-m", "diffkd.cli", "train", "teacher.yaml"]
    subprocess.run(command, cwd=folder, env=ONE_THREAD, check=True, capture_output=True)
    return folder / TEACHER["out"] / "teacher"


@pytest.fixture
def here(tmp_path, monkeypatch, teacher):
    monkeypatch.chdir(tmp_path)
    content = {**CONFIG, "teacher": {"path": str(teacher)}}
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def log(folder):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in records]


def assert_same_runs(one, two, students=("4-steps", "1-steps")):
    for name in students:
        assert same(network(one / "students" / name), network(two / "students" / name)), name
    assert log(one) == log(two)


# the time that is given -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("50m", 3000), ("1h30m", 5400), ("2d", 172800), ("1d2h3m4s", 93784)]
)
def test_durations(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "50", "m", "1.5h", "-5m", "5m1h", "50 m", "٣m"])
def test_what_is_no_duration(text):
    with pytest.raises(UserError, match="is no time; give one such as 50m"):
        duration(text)


@pytest.mark.slow
def test_a_time_that_is_over_saves_and_ends_well(here, cli):
    overrides = [*FOREVER, "method.updates=40"]
    assert cli("distill", "distill.yaml", *overrides, "out=runs/whole").code == 0
    stops = 0
    while True:
        code, _, err = cli("distill", "distill.yaml", *overrides, "out=runs/parts", "--stop-after", "1s")
        assert code == 0
        if not err:
            break
        stops += 1
        assert (
            err == "diffkd: stopped, as the time is over; a checkpoint is saved, the same command goes on\n"
        )
    assert stops >= 1
    assert_same_runs(here / "runs/whole", here / "runs/parts")


@pytest.mark.slow
def test_signals_that_come_twice(here, cli):
    """As from a launcher that passes on what its processes have had already, in the middle of saving."""
    overrides = [*FOREVER, "method.updates=40"]
    assert cli("distill", "distill.yaml", *overrides, "out=runs/whole").code == 0
    command = [sys.executable, "-m", "diffkd.cli", "distill", "distill.yaml", *overrides, "out=runs/parts"]
    process = subprocess.Popen(command, env=ONE_THREAD, stderr=subprocess.PIPE, text=True)
    wait_for(process, here / "runs/parts/log.jsonl", '"update": 20')
    for _ in range(5):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.005)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "a checkpoint is saved" in err
    assert len(list((here / "runs/parts/checkpoints").iterdir())) == 1
    assert cli("distill", "distill.yaml", *overrides, "out=runs/parts").code == 0
    assert_same_runs(here / "runs/whole", here / "runs/parts")


@pytest.mark.slow
def test_a_time_that_is_over_for_two_processes(here, launched):
    """Whose clocks are never quite the same: both end well, and so does the launcher."""
    args = ["distill", "distill.yaml", *FOREVER, "method.updates=200", "training.micro_batches=2"]
    args += ["--stop-after", "1s"]
    first = subprocess.run([*LAUNCHED, *args], env=ONE_THREAD, capture_output=True, text=True)
    for done in (first, launched(2, *args)):
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("stopped, as the time is over; a checkpoint is saved") == 1, done.stderr


def test_a_time_that_is_none_is_refused(here, cli):
    refuse(cli, here, "distill", "distill.yaml", "--stop-after", "soon", says=["--stop-after 'soon'", "50m"])


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_an_evaluation(here, cli, monkeypatch, how):
    """There is nothing to be saved of one: it begins again, and measures the same."""
    overrides = [
        "method.steps=[2]",
        "evaluation={samples: 48, batch_size: 8, teacher_steps: [4]}",
        "pictures=0",
    ]
    assert cli("distill", "distill.yaml", *overrides, "out=runs/whole").code == 0
    seen = [0]
    image_bar = Session.image_bar

    @contextlib.contextmanager
    def interrupting(self, title, total):
        with image_bar(self, title, total) as on_images:

            def interrupt(count):
                seen[0] += 1
                if seen[0] in (8, 14):
                    os.kill(os.getpid(), how)
                on_images(count)

            yield interrupt

    monkeypatch.setattr(Session, "image_bar", interrupting)
    for _ in range(2):
        code, _, err = cli("distill", "distill.yaml", *overrides, "out=runs/parts")
        assert code == 130 and err == "diffkd: interrupted; the same command goes on\n"
    assert cli("distill", "distill.yaml", *overrides, "out=runs/parts").code == 0
    assert_same_runs(here / "runs/whole", here / "runs/parts", ["2-steps"])
    measured = [json.loads((here / f"runs/{name}/metrics.json").read_text()) for name in ("whole", "parts")]
    assert [(r["model"], r["steps"], r["fid"]) for r in measured[0]] == [
        (r["model"], r["steps"], r["fid"]) for r in measured[1]
    ]


SLOW = '''
import time
from collections.abc import Iterator
from diffkd.methods.base import Method
from diffkd.methods import progressive


class Slow(Method):
    """Progressive distillation that sleeps."""

    reference = "none"

    def stages(self, start):
        return progressive.Progressive(steps=[4], updates=50).stages(start)

    def losses(self, nets, batch, step, rng):
        yield from progressive.Progressive(steps=[4], updates=50).losses(nets, batch, step, rng)

    def after_update(self, nets, step):
        open("asleep", "a").write("x")
        time.sleep(60)
'''


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(here):
    (here / "mine").mkdir()
    (here / "mine/slow.py").write_text(SLOW)
    command = [sys.executable, "-m", "diffkd.cli", "distill", "distill.yaml", *FOREVER[:2]]
    environment = {**ONE_THREAD, "PYTHONPATH": str(here)}
    process = subprocess.Popen(
        [*command, "method={name: mine.slow}"], env=environment, stderr=subprocess.PIPE, text=True
    )
    wait_for(process, here / "asleep", "x")
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None  # it would end its update first
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - asked < 20
    assert (here / "asleep").read_text() == "x"


@pytest.mark.slow
def test_a_launcher_that_is_told_to_stop(here, launched):
    """As a queue does it: SIGTERM to what started the processes."""
    args = ["distill", "distill.yaml", *FOREVER, "method.updates=40", "training.micro_batches=2"]
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


# no room ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_disk_that_is_full_half_way(here, cli, disk):
    """The run stops with one line, what was good stays, and with more room it ends as if nothing had been."""
    overrides = ["evaluation=null", "method.steps=[4,1]", "training.checkpoint_every=2", "method.updates=8"]
    assert cli("distill", "distill.yaml", *overrides, "out=runs/whole").code == 0
    whole = here / "runs/whole"
    one = sum(p.stat().st_size for p in next((whole / "checkpoints").iterdir()).iterdir())
    place = disk(f"{int(one * 2.6) // 1024}k")
    code, out, err = cli("distill", "distill.yaml", *overrides, f"out={place / 'run'}")
    assert code == 1 and len(err.splitlines()) == 1
    assert "the disk is full (" in err and "same command goes on" in err and "make room" in err
    assert not [p for p in place.rglob(".*") if p.suffix == ".tmp"]
    kept = sorted(p.name for p in (place / "run/checkpoints").iterdir())
    assert kept and "Traceback" not in err
    (place / "filling").write_bytes(b"0" * 10)
    with contextlib.suppress(OSError), (place / "filling").open("ab") as stream:
        while True:
            stream.write(b"0" * 4096)
            stream.flush()
    code, out, err = cli("distill", "distill.yaml", *overrides, f"out={place / 'run'}")
    assert code == 1 and len(err.splitlines()) == 1 and "the disk is full (0 B free)" in err, err
    disk("100m")
    assert cli("distill", "distill.yaml", *overrides, f"out={place / 'run'}").code == 0
    assert_same_runs(whole, place / "run")


# another config ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_harmless_change_half_way(here, cli, monkeypatch):
    overrides = ["evaluation=null", "method.steps=[4,1]", "pictures=0", "training.log_every=4"]
    assert cli("distill", "distill.yaml", *overrides, "out=runs/whole").code == 0

    def stopped(self):
        path = self.run.folder / "log.jsonl"
        return path.exists() and '"stage_index": 1' in path.read_text()

    with monkeypatch.context() as patch:
        patch.setattr(Session, "should_stop", stopped)
        assert cli("distill", "distill.yaml", *overrides, "out=runs/parts").code == 130
    changed = [*overrides[:3], "training.log_every=1", "training.checkpoint_every=3", "out=runs/parts"]
    refuse(
        cli,
        here,
        "distill",
        "distill.yaml",
        *changed,
        says=["training.log_every was 4, now 1", "--allow goes on"],
    )
    refuse(
        cli,
        here,
        "distill",
        "distill.yaml",
        *changed,
        "seed=9",
        "--allow",
        says=["seed was 0, now 9", "use another out"],
    )
    code, _, err = cli("distill", "distill.yaml", *changed, "--allow")
    assert code == 0 and "goes on with another config" in err and len(err.splitlines()) == 1
    for name in ("4-steps", "1-steps"):
        assert same(
            network(here / f"runs/whole/students/{name}"), network(here / f"runs/parts/students/{name}")
        )
    assert yaml.safe_load((here / "runs/parts/config.yaml").read_text())["training"]["log_every"] == 1


@pytest.mark.slow
def test_another_teacher_or_other_images_half_way(here, cli, image_folder, make_pipeline):
    """Under the same names: a run that went on would be another one."""
    image_folder(here, name="images", classes="ab", size=(8, 8))
    make_pipeline(here, name="teacher", classes=2)
    args = [
        "distill", "distill.yaml", "evaluation=null", "method.steps=[4,1]", "pictures=0",
        "data={kind: folder, path: images, size: 8, channels: 1}", "teacher={path: teacher}",
    ]  # fmt: skip
    assert cli(*args).code == 0
    (here / "images").rename(here / "before")
    image_folder(here, name="images", classes="ab", size=(8, 8), seed=1)
    refuse(cli, here, *args, says=["the data of runs/students has changed since the run began"])
    shutil.rmtree(here / "images")
    (here / "before").rename(here / "images")
    kept = here / "teacher/scheduler/scheduler_config.json"
    content = kept.read_text()
    kept.write_text(content.replace("squaredcos_cap_v2", "linear"))
    refuse(cli, here, *args, says=["the teacher of runs/students has changed"])
    kept.write_text(content)
    make_pipeline(here, name="teacher", classes=2, seed=1)
    refuse(cli, here, *args, says=["the teacher of runs/students has changed"])


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
