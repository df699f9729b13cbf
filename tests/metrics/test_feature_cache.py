"""Features that are kept between commands: the same bits, computed again whenever anything differs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffkd.metrics.evaluation import feature_cache, feature_files
from diffkd.metrics.features.digits import DigitsFeatures
from diffkd.metrics.features.inception import InceptionV3
from tests.refusals import refuse

ALL = "fid,kid,prdc,fd_inf"


@pytest.fixture
def here(tmp_path, monkeypatch, image_folder) -> Path:
    """Two folders of images, and an empty cache."""
    image_folder(tmp_path, name="images", count=41)
    image_folder(tmp_path, name="real", count=70, seed=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(feature_files.VARIABLE, str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """The images that went through the feature network, call by call."""
    calls: list[int] = []
    forward = DigitsFeatures.forward

    def counted(self: Any, images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(DigitsFeatures, "forward", counted)
    return calls


@pytest.fixture
def measure(cli, here, passes) -> Callable[..., tuple[dict[str, Any], int]]:
    """measure(*args) -> (the record, how many images went through the network)."""

    def run(*args: object) -> tuple[dict[str, Any], int]:
        passes.clear()
        code, out, err = cli("evaluate", "images", "real", "--features", "digits", *args, "--json")
        assert code == 0, err
        return json.loads(out), sum(passes)

    return run


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "seconds"}


def test_the_second_command_gives_the_same_bits_without_the_reference(measure):
    """Numbers, notes and protocol; by another order of metrics, and after features were asked for."""
    (first, once), (second, twice) = measure(), measure()
    assert (once, twice) == (41 + 70, 41) and numbers(first) == numbers(second)
    uncached, count = measure("--no-cache")
    assert count == 41 + 70 and numbers(uncached) == numbers(first)
    wider, once = measure("--metrics", ALL)  # statistics alone are no features
    again, twice = measure("--metrics", ALL)
    assert (once, twice) == (41 + 70, 41) and numbers(wider) == numbers(again)
    plain, count = measure("--metrics", ALL, "--no-cache")
    assert count == 41 + 70 and numbers(plain) == numbers(wider)
    assert measure()[1] == 41  # nothing was lost


def test_statistics_are_kept_too(cli, here, measure, passes):
    measure()
    passes.clear()
    assert cli("stats", "real", "--features", "digits", "--out", "cached.npz").code == 0
    assert passes == []
    assert cli("stats", "real", "--features", "digits", "--out", "plain.npz", "--no-cache").code == 0
    one, two = np.load("cached.npz"), np.load("plain.npz")
    assert one.files == two.files and all(np.array_equal(one[key], two[key]) for key in one)


def one_pixel(here: Path) -> None:
    path = here / "real" / "033.png"
    status, pixels = path.stat(), np.asarray(Image.open(path)).copy()
    pixels[3, 3] ^= 1
    Image.fromarray(pixels).save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # name, size and times tell nothing


@pytest.mark.parametrize(
    ("change", "args"),
    [
        (one_pixel, ()),
        (lambda here: (here / "real" / "069.png").unlink(), ()),
        (lambda here: (here / "real" / "000.png").rename(here / "real" / "zz.png"), ()),
        (None, ("--batch-size", 7)),
        (None, ("--resize", 9)),
    ],
)
def test_what_features_depend_on_has_them_computed_again(here, measure, change, args):
    measure()
    if change is not None:
        change(here)
    assert measure(*args)[1] > 41 + 60


def test_the_code_and_versions_count(here, measure, monkeypatch):
    measure()
    monkeypatch.setattr(feature_cache, "_code", lambda: "other")
    assert measure()[1] == 111
    monkeypatch.setattr(feature_cache, "versions", lambda: {"torch": "1.0"})
    assert measure()[1] == 111
    assert measure()[1] == 41


def test_a_network_of_the_users_own_is_not_kept(cli, here, monkeypatch):
    (here / "kept_features.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n    num_features = 4\n"
        "    def forward(self, x):\n        return x.float().flatten(1)[:, :4]\n"
    )
    monkeypatch.syspath_prepend(here)
    assert cli("evaluate", "images", "real", "--features", "kept_features.Net").code == 0
    assert not (here / "cache").exists()


def kept(here: Path) -> Path:
    [path] = (here / "cache" / "features").glob("*.npz")
    return path


@pytest.mark.parametrize("damage", ["empty", "cut", "bit", "other", "pickle"])
def test_damaged_files_are_computed_again(here, measure, damage):
    first, _ = measure()
    path = kept(here)
    content = bytearray(path.read_bytes())
    if damage == "empty":
        content = bytearray()
    elif damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "bit":
        content[len(content) // 2] ^= 4
    path.write_bytes(content)
    if damage == "other":  # of other images, under this name
        np.savez(path, mu=np.zeros(64), sigma=np.eye(64), num_samples=70, protocol=np.array('{"key": "x"}'))
    if damage == "pickle":
        np.savez(path, mu=np.array([{}]), sigma=np.eye(64), num_samples=70)
    second, count = measure()
    assert count == 111 and numbers(first) == numbers(second)
    assert measure()[1] == 41


@pytest.mark.parametrize("place", ["/proc/nowhere", "a file", "off"])
def test_where_nothing_can_be_kept_nothing_fails(here, measure, monkeypatch, place):
    (here / "a file").write_text("x")
    monkeypatch.setenv(feature_files.VARIABLE, place)
    assert [measure()[1] for _ in range(2)] == [111, 111]


def test_a_full_disk_costs_nothing(here, measure, monkeypatch):
    monkeypatch.setattr(feature_files, "free_bytes", lambda path: 1000)
    assert measure()[1] == 111 and not list((here / "cache" / "features").iterdir())


def test_those_used_longest_ago_go_first(here, measure, monkeypatch):
    for seed in range(3):
        measure("--batch-size", seed + 1)
    size = kept_size(here) // 3
    for age, path in enumerate(
        sorted((here / "cache/features").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    ):
        os.utime(path, (1000 + age, 1000 + age))
    measure("--batch-size", 1)  # is used now
    monkeypatch.setattr(feature_files, "LIMIT", 3 * size + size // 2)
    measure("--batch-size", 4)
    assert kept_size(here) <= feature_files.LIMIT
    assert [measure("--batch-size", n)[1] for n in (1, 4, 2)] == [41, 41, 111]


def kept_size(here: Path) -> int:
    return sum(path.stat().st_size for path in (here / "cache" / "features").iterdir())


def test_folders(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    for name in ("XDG_CACHE_HOME", feature_files.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    assert feature_files.folder() == Path("/home/someone/.cache/diffkd/features")
    monkeypatch.setenv("HOME", "")
    assert feature_files.folder() is None
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert feature_files.folder() == Path("/x/diffkd/features")
    monkeypatch.setenv(feature_files.VARIABLE, "~/mine")
    assert feature_files.folder() == Path("/home/someone/mine/features")
    monkeypatch.setenv(feature_files.VARIABLE, "off")
    assert feature_files.folder() is None


def test_two_processes(launched, here):
    """Each reads its own copy; the same bits again."""
    args = ("evaluate", "images", "real", "--features", "digits", "--metrics", ALL, "--out")
    for name in ("one.json", "two.json"):
        ran = launched(2, *args, here / name)
        assert ran.returncode == 0, ran.stderr
    one, two = (json.loads((here / name).read_text()) for name in ("one.json", "two.json"))
    assert numbers(one) == numbers(two) and "kept from an earlier command" in ran.stdout


def test_inception_by_its_protocol(here, monkeypatch):
    """Weights, resize and precision are in the key."""
    from diffkd.io.processes import Processes

    processes = Processes("cpu")
    made = [
        InceptionV3.untrained(), InceptionV3.untrained(seed=1), InceptionV3.untrained(resize="clean"),
        InceptionV3.untrained(dtype=torch.float64),
    ]  # fmt: skip
    keys = {feature_cache.key_of("x", network, network.describe(), 64, processes) for network in made}
    assert len(keys) == 4
    shutil.rmtree(here / "cache", ignore_errors=True)


def test_a_folder_keeps_the_features_of_both_sets(cli, here, measure, passes):
    """The second command computes none, whichever set is which, and by other metrics."""
    (plain, _), (first, once) = measure("--metrics", ALL, "--no-cache"), measure("--cache", "kept")
    (second, twice), (more, none) = measure("--cache", "kept"), measure("--cache", "kept", "--metrics", ALL)
    assert (once, twice, none) == (111, 0, 0) and numbers(first) == numbers(second)
    assert numbers(more) == numbers(plain)
    passes.clear()
    assert cli("fid", "real", "images", "--features", "digits", "--cache", "kept").code == 0
    assert cli("stats", "images", "--features", "digits", "--cache", "kept", "--out", "i.npz").code == 0
    assert passes == [] and len(list((here / "kept").glob("*.npz"))) == 2
    assert not (here / "cache").exists()
    one_pixel(here)
    assert measure("--cache", "kept")[1] == 70  # the other set is known


def test_two_processes_share_a_folder(launched, here):
    args = (
        "evaluate",
        "images",
        "real",
        "--features",
        "digits",
        "--metrics",
        ALL,
        "--cache",
        "kept",
        "--out",
    )
    for name in ("one.json", "two.json"):
        ran = launched(2, *args, here / name)
        assert ran.returncode == 0, ran.stderr
        files = {path.name: path.stat().st_mtime_ns for path in (here / "kept").iterdir()}
        assert len(files) == 2
    one, two = (json.loads((here / name).read_text()) for name in ("one.json", "two.json"))
    assert numbers(one) == numbers(two)


def test_folders_that_cannot_keep_features(cli, here, monkeypatch):
    args = ("evaluate", "images", "real", "--features")
    refuse(cli, here, *args, "digits", "--cache", "kept", "--no-cache", says="--no-cache")
    (here / "a file").write_text("x")
    refuse(cli, here, *args, "digits", "--cache", "a file", says="--cache a file")
    (here / "own_features.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n    num_features = 4\n"
        "    def forward(self, x):\n        return x.float().flatten(1)[:, :4]\n"
    )
    code, _, err = cli(*args, "own_features.py", "--cache", "kept")
    assert code == 2 and "--cache kept keeps no features of a network of your own" in err
