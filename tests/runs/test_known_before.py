"""What can be known before a feature network runs is refused before it; no number is lost after it."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import diffkd
from diffkd.runs import evaluate, record_file
from tests.refusals import refuse

NETWORK = """
import torch

class Net(torch.nn.Module):
    num_features = 4

    def forward(self, images):
        with open("called", "a") as file:
            file.write("x" * len(images))
        return images.float().flatten(1)[:, :4]
"""


@pytest.fixture
def here(tmp_path, monkeypatch, image_folder, make_pipeline) -> Path:
    for name, count in (("real", 40), ("images", 12), ("one", 1), ("mixed", 5), ("broken", 5), ("empty", 1)):
        image_folder(tmp_path, name=name, count=count, seed=count)
    (tmp_path / "empty" / "000.png").unlink()
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(tmp_path / "mixed" / "zz.png")
    (tmp_path / "broken" / "003.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((9, 8, 8, 1), np.float32))
    np.savez(tmp_path / "few.npz", arr_0=np.zeros((4, 8, 8, 1), np.uint8))
    os.mkfifo(tmp_path / "pipe.npz")  # to open it would wait for ever
    make_pipeline(tmp_path, name="labelled", classes=10)
    make_pipeline(tmp_path, name="plain")
    (tmp_path / "toy.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("toy", None)
    return tmp_path


KNOWN = {
    "target missing": (["gone"], "gone"),
    "target missing, a file": (["gone.npz"], "gone.npz"),
    "target of mixed sizes": (["mixed"], "--resize"),
    "target of one image": (["one"], "at least 2"),
    "target without images": (["empty"], "no images"),
    "target not an image": (["broken"], "003.png"),
    "target of floats": (["floats.npz"], "float32"),
    "too many samples": (["images", "--samples", 13], "12 images"),
    "labels out of range": (["labelled", "--steps", 1, "--classes", "3,11"], "11"),
    "labels of a model without": (["plain", "--steps", 1, "--classes", "3"], "unconditional"),
    "no steps": (["plain"], "--steps"),
    "steps out of range": (["plain", "--steps", 3000], "3000"),
    "an option of models": (["images", "--guidance", 2], "--guidance"),
    "an option without its metric": (["images", "--metrics", "kid", "--bootstrap", 5], "--bootstrap"),
    "an unknown metric": (["images", "--metrics", "fidd"], "--metrics"),
    "too few for neighbours": (["few.npz", "--metrics", "prdc"], "nearest neighbour"),
    "too few for a line": (["images", "--metrics", "fd_inf"], "fd_inf"),
    "no probabilities": (["real", "--metrics", "is"], "probabilities"),
    "too few for splits": (["images", "--metrics", "is"], "splits"),
    "no teacher": (["plain", "--steps", 1, "--metrics", "agreement"], "--teacher"),
    "no weights": (["images", "--metrics", "fid,fd_dino", "--dino-weights", "./gone"], "./gone"),
    "out is a folder": (["images", "--out", "real"], "--out real"),
    "out in a file": (["images", "--out", "toy.py/x.json"], "toy.py"),
}


@pytest.mark.parametrize("fault", KNOWN)
def test_refused_before_the_network(cli, here, fault):
    args, says = KNOWN[fault]
    refuse(cli, here, "evaluate", *args, "--reference", "real", "--features", "toy.Net", says=says)
    assert not (here / "called").exists()


@pytest.mark.parametrize(
    "reference", ["gone", "mixed", "one", "empty", "broken", "floats.npz", "labelled", "pipe.npz"]
)
def test_a_reference_is_refused_before_the_network(cli, here, reference):
    refuse(cli, here, "evaluate", "images", reference, "--features", "toy.Net")
    refuse(cli, here, "fid", "images", reference, "--features", "toy.Net")
    assert not (here / "called").exists()


def test_a_right_target_is_measured(cli, here):
    """The network of these tests is one that runs."""
    assert cli("evaluate", "images", "real", "--features", "toy.Net").code == 0
    assert (here / "called").read_text() == 52 * "x"


@pytest.mark.parametrize("fault", ["one", "mixed", "broken", "exists", "folder", "suffix", "full"])
def test_statistics_are_refused_before_the_network(cli, here, fault, monkeypatch):
    (here / "exists.npz").write_bytes(b"")
    images = fault if (here / fault).is_dir() else "images"
    out = {"exists": "exists.npz", "folder": "real", "suffix": "x.npy"}.get(fault, "x.npz")
    if fault == "full":
        monkeypatch.setattr("diffkd.runs.stats.free_bytes", lambda path: 100)
    code, _, err = cli("stats", images, "--out", out, "--features", "toy.Net")
    assert code == (1 if fault == "full" else 2) and err.count("error:") == len(err.splitlines()) == 1
    assert not (here / "called").exists()


# numbers that are not lost


@pytest.fixture
def full_disk(monkeypatch) -> Callable[[], None]:
    def fill(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "r.json")

    return lambda: monkeypatch.setattr(record_file, "write_json", fill)


def test_a_full_disk_loses_no_number(cli, here, full_disk):
    args = ("evaluate", "images", "real", "--features", "digits")
    expected = cli(*args)
    full_disk()
    code, out, err = cli(*args, "--out", "r.json")
    assert code == 1 and out == expected.stdout
    assert err.count("error:") == 1 and "--out r.json: the disk is full" in err
    code, out, _ = cli(*args, "--out", "r.json", "--json")
    assert code == 1 and json.loads(out)["fid"] > 0


def test_a_full_disk_loses_no_record_in_python(here, full_disk, caplog):
    full_disk()
    record = diffkd.evaluate("images", "real", features="digits", out=Path("r.json"))
    assert record["fid"] > 0 and "the disk is full" in caplog.text


def test_a_name_too_long_is_refused_before_or_loses_nothing(cli, here):
    code, out, err = cli("evaluate", "images", "real", "--features", "toy.Net", "--out", "x" * 300)
    assert code in (1, 2) and len([line for line in err.splitlines() if "error:" in line]) == 1
    assert "FID" in out or not (here / "called").exists()


def test_records_are_written_though_nobody_reads(here, monkeypatch):
    """A pipe that breaks while several step counts are measured: the file has what was measured."""

    def broken(console: Console, text: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(evaluate.progress, "say", broken)
    with pytest.raises(BrokenPipeError):
        diffkd.evaluate("plain", "real", features="digits", steps=[2, 1], samples=8, out=Path("r.json"))
    assert json.loads((here / "r.json").read_text())["steps"] == 2


def test_every_step_count_is_said_as_it_comes(cli, here):
    args = ("--steps", "2,1", "--samples", 8, "--features", "digits")
    _, out, _ = cli("evaluate", "plain", "real", *args)
    lines = [line for line in out.splitlines() if " steps: FID " in line]
    assert [line.split()[0] for line in lines] == ["2", "1"]


def test_a_run_that_takes_no_record_loses_nothing(cli, here, monkeypatch):
    (here / "config.yaml").write_text("out: x")  # the pipeline lies in a run
    monkeypatch.setattr(evaluate, "append_json", lambda *a: (_ for _ in ()).throw(OSError(28, "full")))
    code, out, err = cli("evaluate", "plain", "real", "--steps", 1, "--samples", 8, "--features", "digits")
    assert code == 0 and "FID" in out and "metrics.json does not take the record" in err
