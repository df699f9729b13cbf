"""Names that are too long or odd: refused in one line, before any work, and nothing is written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from diffkd.cli import main
from diffkd.io.places import check_writable
from tests.cli import scene
from tests.refusals import refuse

LONG = "e" * 300
ODD = {
    "long": LONG,
    "nearly too long": "e" * 250,  # its temporary sibling's would be
    "a long folder": f"{LONG}/x",
    "a long path": "/".join(["e" * 200] * 21),
    "no name": "\0",
    "bytes that are no text": os.fsdecode(b"\xff\xfe"),
    "below a file": "record.json/x",
    "a circle": "circle",
    "below a circle": "circle/x",
    "a link to nowhere": "nowhere",
    "a device": "/dev/null/x",
    "a folder of the system": "/proc/x",
}
OUTPUTS = ["train", "distill", "benchmark", "sample", "sample-npz", "stats", "evaluate"]


def named(command: str, name: str) -> tuple[object, ...]:
    """The command with the output `name`, whose suffix stays what the command needs."""
    *args, last = scene.WRITING[command]
    if command in ("train", "distill", "benchmark"):
        config = yaml.safe_load(Path(str(last)).read_text())
        Path("odd.yaml").write_text(yaml.safe_dump({**config, "out": name}))
        return (*args, "odd.yaml")
    return (*args, f"{name}{'.npz' if command in ('sample-npz', 'stats') else ''}")


@pytest.fixture
def odd_scene(at_scene: Path) -> Path:
    (at_scene / "circle").symlink_to("circle")
    (at_scene / "circle.npz").symlink_to("circle.npz")
    (at_scene / "nowhere").symlink_to("gone/there")
    (at_scene / "nowhere.npz").symlink_to("gone/there")
    return at_scene


@pytest.mark.parametrize("name", ODD.values(), ids=ODD.keys())
@pytest.mark.parametrize("command", OUTPUTS)
def test_outputs(odd_scene, cli, monkeypatch, command, name):
    if command == "evaluate" and name == "nowhere":
        pytest.skip("a file that takes the place of a link is written")
    args = named(command, name)

    def works(*args: object, **options: object) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setattr("diffkd.data.digits.load", works, raising=False)
    monkeypatch.setattr("diffkd.models.loading.load", works)
    monkeypatch.setattr("diffkd.metrics.features.load", works)
    refuse(cli, odd_scene, *args, says="" if name == "\0" else "out")  # what reads it first


INPUTS = {
    "nobody's home": "~nosuchuser/x",
    "long": LONG,
    "a long path": "/".join(["e" * 200] * 21),
    "bytes that are no text": os.fsdecode(b"\xff\xfe"),
    "below a file": "record.json/x",
    "a circle": "circle",
    "a link to nowhere": "nowhere",
    "empty": "",
    "a space": " ",
}
READING = {
    "evaluate": ("evaluate", "NAME", "--reference", "images", "--features", "digits"),
    "reference": ("evaluate", "images", "--reference", "NAME", "--features", "digits"),
    "weights": ("evaluate", "images", "--reference", "images", "--weights", "NAME"),
    "repeat": ("evaluate", "--repeat", "NAME"),
    "fid": ("fid", "images", "NAME", "--features", "digits"),
    "stats": ("stats", "NAME", "--out", "ref.npz", "--features", "digits"),
    "compare": ("compare", "record.json", "NAME"),
    "sample": ("sample", "NAME", "--steps", "1", "--out", "images2"),
    "config": ("train", "NAME"),
    "teacher": ("distill", "distill.yaml", "teacher.path=NAME"),
    "data": ("train", "train.yaml", "data={kind: folder, path: NAME, size: 8, channels: 1}"),
    "models": ("benchmark", "bench.yaml", "models.0.path=NAME"),
    "methods": ("methods", "NAME"),
}


@pytest.mark.parametrize("name", INPUTS.values(), ids=INPUTS.keys())
@pytest.mark.parametrize("command", READING)
def test_inputs(odd_scene, cli, monkeypatch, command, name):
    if command == "data" and not name:
        pytest.skip("the current folder, which has images")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    in_yaml = json.dumps(name) if "=" in READING[command][-1] or command == "data" else name
    args = [word.replace("NAME", in_yaml) for word in READING[command]]
    code, out, err = cli(*args)
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith("diffkd: error: "), (code, out, err)


def test_nobody_expands_a_home_by_itself():
    """Path.expanduser raises for an unknown home; places.expanded leaves the name as a shell does."""
    package = Path(main.__code__.co_filename).parents[1]
    assert [p.name for p in package.rglob("*.py") if ".expanduser()" in p.read_text()] == []


@pytest.mark.parametrize("number", [1, 13, 30], ids=["EPERM", "EACCES", "EROFS"])
def test_a_place_where_nothing_can_be_written(at_scene, cli, monkeypatch, number):
    """Said by the first try, in every command, whoever runs it: root may write where others may not."""

    def fails(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("diffkd.io.places.tempfile.TemporaryFile", fails)
    for command in OUTPUTS:
        refuse(cli, at_scene, *scene.WRITING[command], says=["made", "use another place"])


def test_a_name_that_fits_just_so(tmp_path):
    """The longest that is not refused can be written with all that goes with it."""
    from diffkd.io.files import new_file

    longest = max(n for n in range(200, 256) if _taken(tmp_path / ("x" * n)))
    with new_file(tmp_path / ("x" * longest)) as temporary:
        temporary.write_text("content")
    assert (tmp_path / ("x" * longest)).read_text() == "content"


def _taken(path: Path) -> bool:
    try:
        check_writable(path, "--out")
    except ValueError:
        return False
    return True
