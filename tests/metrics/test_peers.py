"""Each mode of Inception beside the tool that it is named for: scripts/compare_peers.py as users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import diffkd

SCRIPT = Path(diffkd.__file__).parents[1] / "scripts/compare_peers.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def peers(tmp_path_factory) -> Path:
    """The wheels of the tools alone, kept between runs: in DIFFKD_PEERS or a cache folder."""
    folder = Path(os.environ.get("DIFFKD_PEERS") or Path("~/.cache/diffkd/peers").expanduser())
    pytest.importorskip("scipy")
    pytest.importorskip("sklearn")
    code = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import compare_peers as c, pathlib; "
    done = subprocess.run(
        [sys.executable, "-c", f"{code}c.install(pathlib.Path({str(folder)!r}))"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"the tools cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return folder


def compared(peers: Path, out: Path, *options: object) -> dict[tuple[str, str, str], float]:
    """(kind of file, mode, number): relative difference."""
    command = [sys.executable, str(SCRIPT), "--peers", str(peers), "--out", str(out), "--rounds", "0"]
    done = subprocess.run([*command, *map(str, options)], capture_output=True, text=True, timeout=7200)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    return {(row["files"], row["mode"], row["number"]): row["difference"] for row in rows}


def test_each_mode_gives_the_number_of_its_tool(peers, tmp_path):
    """300 images, each tool from the files to its own distance. Most of what is left is the tools' rounding,
    which take the root of a singular product."""
    found = compared(peers, tmp_path / "rows.json", "--kinds", "png", "--images", 150, "--fid-only")
    assert {mode for _, mode, _ in found} == {"tf1", "clean", "pytorch-fid", "torchmetrics"}
    assert max(found.values()) < 1e-5, found


def test_each_preset_gives_the_number_of_its_tool(peers, tmp_path):
    """Of JPEG, which the tools decode otherwise than diffkd by itself."""
    options = ("--kinds", "jpeg", "--images", 12, "--fid-only", "--presets")
    found = compared(peers, tmp_path / "rows.json", *options)
    assert {mode for _, mode, _ in found} == {"tf1", "clean", "pytorch-fid"} and len(found) == 3
    assert max(found.values()) < 1e-5, found


def test_every_number_of_images_that_are_large(peers, tmp_path):
    found = compared(peers, tmp_path / "rows.json", "--kinds", "400x300", "--images", 12, "--project")
    numbers = {"fid", "kid", "is", "precision", "recall", "density", "coverage"}
    assert {number for _, _, number in found} == numbers
    assert max(found.values()) < 1e-5, found
