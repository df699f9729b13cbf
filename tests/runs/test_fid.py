"""Two folders, as users of other tools write it: `diffkd evaluate A B`, `diffkd fid A B`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import diffkd
from diffkd.runs.stats import stats
from tests.refusals import refuse


@pytest.fixture
def here(tmp_path, monkeypatch, image_folder) -> Path:
    image_folder(tmp_path, name="a", count=41)
    image_folder(tmp_path, name="b", count=60, seed=1)
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        stats(name, tmp_path / f"{name}.npz", Console(quiet=True), features_name="digits")
    return tmp_path


def printed(cli, *args: object) -> float:
    code, out, err = cli("fid", *args)
    assert code == 0, err
    [line] = out.splitlines()
    assert line.startswith("FID: ")
    return float(line.removeprefix("FID: "))


def test_two_folders(cli, here):
    args = ("--features", "digits")
    record = json.loads(cli("evaluate", "a", "b", *args, "--json").stdout)
    by_option = json.loads(cli("evaluate", "a", "--reference", "b", *args, "--json").stdout)
    assert record["fid"] == by_option["fid"] == printed(cli, "a", "b", *args)
    assert record["fid"] == diffkd.evaluate("a", "b", features="digits")["fid"]
    assert printed(cli, "b", "a", *args) == pytest.approx(record["fid"], rel=1e-9)


@pytest.mark.parametrize(("one", "two"), [("a", "b.npz"), ("b.npz", "a"), ("a.npz", "b.npz")])
def test_statistics_on_either_side(cli, here, one, two):
    expected = diffkd.evaluate("a", "b", features="digits")["fid"]
    assert printed(cli, one, two) == pytest.approx(expected, rel=1e-9)  # by the features that they are of


def test_statistics_of_unknown_making_are_said(cli, here):
    mu, sigma = np.zeros(64), np.eye(64)
    np.savez("other.npz", mu=mu, sigma=sigma)
    np.savez("more.npz", mu=mu + 1, sigma=sigma)
    code, out, err = cli("fid", "other.npz", "more.npz")
    assert (code, out) == (0, "FID: 64.0\n") and err.count("does not say by which features") == 2
    code, out, err = cli("fid", "a.npz", "other.npz")
    assert code == 0 and err.count("does not say by which features") == 1


def test_what_cannot_be_compared(cli, here):
    np.savez("wide.npz", mu=np.zeros(65), sigma=np.eye(65))
    refuse(cli, here, "fid", "a.npz", "wide.npz", says=["wide.npz", "65"])
    refuse(cli, here, "fid", "a", "wide.npz", "--features", "digits", says=["wide.npz", "65"])
    refuse(cli, here, "evaluate", "a", "b", "--reference", "b", says=["b", "--reference"])
    refuse(cli, here, "evaluate", "a", says=["evaluate TARGET --reference REFERENCE"])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (
            ("fid", "a.npz", "b.npz", "--features", "inception"),
            ["--features is for images", "a.npz and b.npz"],
        ),
        (("fid", "a.npz", "b.npz", "--resize", 9), "--resize is for images"),
        (("fid", "a.npz", "b.npz", "--cache", "kept"), "--cache is for images"),
        (
            ("fid", "images.npz", "b.npz", "--resize", 9),
            "--resize 9 does nothing here: only folders and data",
        ),
        (("evaluate", "images.npz", "digits", "--resize", 9), "--resize 9 does nothing here"),
        (("evaluate", "a", "digits", "--split", "test"), "--split test does nothing here: only data sets"),
        (("stats", "digits", "--resize", 9, "--out", "x.npz"), "--resize 9 does nothing here"),
        (("stats", "a", "--split", "test", "--out", "x.npz"), "--split test does nothing here"),
        (("features", "train", "a", "--split", "x", "--out", "x.safetensors"), "--split x does nothing here"),
        (("features", "train", "images.npz", "--resize", 9, "--out", "x.safetensors"), "--resize 9 does"),
        (("fid", "sizes", "a"), "(one/x.png is 8x8, two/x.png 9x9); say --resize"),
        (("fid", "a", "classed", "--features", "digits", "--per-class"), "the images have no class labels"),
        (("fid", "classed", "a", "--features", "digits", "--per-class"), "the reference has no class labels"),
    ],
)
def test_options_that_would_do_nothing_and_sets_that_do_not_fit(cli, here, image_folder, args, says):
    np.savez("images.npz", arr_0=np.zeros((60, 8, 8, 1), np.uint8))
    image_folder(here, name="classed", classes=("x", "y"), count=2)
    for name, side in (("one", 8), ("two", 9)):
        (here / "sizes" / name).mkdir(parents=True)
        Image.new("L", (side, side)).save(here / "sizes" / name / "x.png")
    refuse(cli, here, *args, says=says)


def test_a_size_is_taken_where_one_of_the_sets_is_resized(cli, here):
    np.savez("images.npz", arr_0=np.zeros((60, 9, 9, 1), np.uint8))
    for args in (("a", "images.npz"), ("images.npz", "a")):
        code, out, err = cli("fid", *args, "--features", "digits", "--resize", 9)
        assert code == 0 and out.startswith("FID: ") and "of another size" not in err
    with pytest.raises(diffkd.UserError, match="resize 9 does nothing here"):
        diffkd.evaluate(np.zeros((60, 8, 8, 1), np.uint8), "digits", resize=9)
    with pytest.raises(diffkd.UserError, match="split test does nothing here"):
        diffkd.compute_statistics(np.zeros((60, 8, 8, 1), np.uint8), split="test")


def test_the_help_says_what_is_so(cli, monkeypatch):
    """Samples of models only; weights of one's own."""
    monkeypatch.setenv("COLUMNS", "300")
    text = " ".join(cli("evaluate", "--help").stdout.replace("│", " ").split())
    assert "Images of a model, default as many as the reference has" in text
    assert ".safetensors of your own" in text


HEAVY = ("diffusers", "transformers", "torchmetrics", "sklearn", "pandas", "datasets", "scipy", "matplotlib")


@pytest.mark.parametrize("command", ["fid", "evaluate"])
def test_a_folder_is_measured_without_what_opens_models(here, command):
    """In a fresh process: what takes seconds and memory to import is imported where a model is opened."""
    script = (
        "import sys\nfrom diffkd.cli import main\n"
        f"sys.argv = ['diffkd', {command!r}, 'a', 'b', '--features', 'digits']\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code, stop.code\n"
        f"print('HEAVY', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "FID" in ran.stdout and ran.stdout.splitlines()[-1] == "HEAVY"
