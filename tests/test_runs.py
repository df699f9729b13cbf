"""The run folder: whole files or none, checkpoints that come back to the bit, one process at a time."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import subprocess
import sys
import textwrap

import pytest
import torch

from diffkd import runs
from diffkd.base import UserError
from diffkd.runs import Run, new_file, new_folder, read_json, write_json
from tests.refusals import tree

CONFIG = {
    "out": "x",
    "seed": 0,
    "method": [{"name": "progressive", "steps": [4, 2]}],
    "training": {"ema": 0.99},
}


@pytest.fixture
def run(tmp_path):
    held = Run(tmp_path / "run", CONFIG)
    yield held
    held.close()


class Boom(BaseException):
    """Not even an Exception: a KeyboardInterrupt must leave nothing behind either."""


# whole or not at all ----------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_file_appears_at_the_end_and_only_then(tmp_path, old):
    path = tmp_path / "deep" / "file.txt"
    if old is not None:
        path.parent.mkdir()
        path.write_bytes(old)
    with new_file(path) as temporary:
        temporary.write_bytes(b"new")
        assert (path.read_bytes() if path.exists() else None) == old
    assert tree(tmp_path / "deep") == {"file.txt": b"new"}


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_file_that_fails_leaves_the_old_one(tmp_path, old):
    path = tmp_path / "file.txt"
    if old is not None:
        path.write_bytes(old)
    before = tree(tmp_path)
    with pytest.raises(Boom), new_file(path) as temporary:
        temporary.write_bytes(b"half")
        raise Boom
    assert tree(tmp_path) == before


def test_a_file_that_was_never_written_leaves_the_old_one(tmp_path):
    (tmp_path / "file.txt").write_bytes(b"old")
    with pytest.raises(OSError), new_file(tmp_path / "file.txt"):
        pass
    assert tree(tmp_path) == {"file.txt": b"old"}


def test_a_folder_replaces_the_old_one_whole(tmp_path):
    path = tmp_path / "deep" / "folder"
    with new_folder(path) as temporary:
        (temporary / "a").write_bytes(b"1")
        assert not path.exists()
    with new_folder(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "b").write_bytes(b"2")
        assert tree(path) == {"a": b"1"}
    assert tree(tmp_path / "deep") == {"folder": None, "folder/sub": None, "folder/sub/b": b"2"}


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_fails_leaves_the_old_one(tmp_path, there):
    path = tmp_path / "folder"
    if there:
        path.mkdir()
        (path / "a").write_bytes(b"1")
    before = tree(tmp_path)
    with pytest.raises(Boom), new_folder(path) as temporary:
        (temporary / "b").write_bytes(b"half")
        raise Boom
    assert tree(tmp_path) == before


def test_a_link_to_a_folder_stays_one(tmp_path):
    """Where results lie on another disk, they go on doing so."""
    (tmp_path / "disk" / "folder").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "folder")
    with new_folder(tmp_path / "link") as temporary:
        (temporary / "a").write_bytes(b"1")
    assert (tmp_path / "link").is_symlink() and tree(tmp_path / "disk" / "folder") == {"a": b"1"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "link"]
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["folder"]


def test_what_a_killed_process_left_is_no_hindrance(tmp_path):
    """The temporary of an earlier process of the same number, as after a reboot."""
    with pytest.raises(Boom), new_folder(tmp_path / "folder") as temporary:
        name = temporary.name
        raise Boom
    (tmp_path / name).mkdir()
    (tmp_path / name / "stale").write_bytes(b"")
    with new_folder(tmp_path / "folder") as temporary:
        (temporary / "fresh").write_bytes(b"")
    assert tree(tmp_path) == {"folder": None, "folder/fresh": b""}


def test_json_round_trip(tmp_path):
    content = {"a": [1, 2.5, None, "ü"], "b": {"c": True}}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json", None) == content
    assert read_json(tmp_path / "y.json", []) == []


# the folder and its config ----------------------------------------------------------------------------


def test_the_same_config_opens_the_run_again(tmp_path):
    Run(tmp_path / "run", CONFIG).close()
    before = tree(tmp_path)
    Run(tmp_path / "run", json.loads(json.dumps(CONFIG))).close()
    assert tree(tmp_path) == before


def test_an_empty_folder_may_become_a_run(tmp_path):
    Run(tmp_path, CONFIG).close()
    assert (tmp_path / "config.yaml").is_file()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 1}, r"seed was 0, now 1"),
        ({"training": {"ema": 0.5}}, r"training\.ema was 0\.99, now 0\.5"),
        ({"method": [{"name": "progressive", "steps": [4, 1]}]}, r"method.*\[4, 2\].*\[4, 1\]"),
        ({"extra": None, "out": None}, r"out was x, now None"),
        ({"training": {}}, r"training\.ema was 0\.99, now None"),
        ({"training": None}, r"training was .*, now None"),
    ],
)
def test_another_config_is_refused_by_its_key(tmp_path, changed, named):
    Run(tmp_path / "run", CONFIG).close()
    before = tree(tmp_path)
    with pytest.raises(UserError, match=named):
        Run(tmp_path / "run", {**CONFIG, **changed})
    assert tree(tmp_path) == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="not empty and holds no run"):
        Run(tmp_path, CONFIG)
    with pytest.raises(UserError, match="is a file"):
        Run(tmp_path / "thesis.tex", CONFIG)
    assert tree(tmp_path) == {"thesis.tex": b""}


def test_another_process_is_kept_out(tmp_path):
    holder = textwrap.dedent(
        """
        import sys, json
        from pathlib import Path
        from diffkd.runs import Run
        run = Run(Path(sys.argv[1]), json.loads(sys.argv[2]))
        print("held", flush=True)
        sys.stdin.read()
        """
    )
    command = [sys.executable, "-c", holder, str(tmp_path / "run"), json.dumps(CONFIG)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"run is in use by another"):
            Run(tmp_path / "run", CONFIG)
        other.kill()  # a lock dies with its process: no stale lock to be removed by hand
        other.wait()
        Run(tmp_path / "run", CONFIG).close()


def test_the_environment_is_written_once(run):
    run.describe("cpu")
    first = json.loads((run.folder / "environment.json").read_text())
    run.describe("cuda:7")
    assert json.loads((run.folder / "environment.json").read_text()) == first
    assert first["device"] == "cpu" and first["command"] == sys.argv
    assert first["versions"]["torch"] == importlib.metadata.version("torch")


# checkpoints ------------------------------------------------------------------------------------------


def weights(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    odd = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, 1 / 3])
    return {
        "student": {
            "a.weight": torch.randn(3, 4, generator=rng),
            "turned": torch.randn(5, 4, generator=rng).T,
            "half": torch.randn(7, generator=rng).bfloat16(),
            "odd": odd,
            "odd64": odd.double() / 3,
        },
        "student-optimizer": {
            "0.step": torch.tensor(12.0),
            "0.count": torch.tensor(2**62 + 1),
            "0.flag": torch.tensor(True),
        },
        "ema": {"0": torch.empty(0, 3), "1": torch.randn(2, generator=rng, requires_grad=True)},
    }


def bits(tensors) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        f"{name}/{key}": (
            str(value.dtype),
            tuple(value.shape),
            bytes(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()),
        )
        for name, values in tensors.items()
        for key, value in values.items()
    }


def test_a_checkpoint_comes_back_to_the_bit(run):
    state = {"ema_step": 12, "x": 0.1 + 0.2, "nested": {"a": [1, None]}}
    run.save_checkpoint(3, 12, weights(), state)
    update, tensors, found = run.load_checkpoint(3)
    assert update == 12 and found == state
    assert bits(tensors) == bits(weights())


def test_there_is_none_at_first_and_none_of_another_stage(run):
    assert run.load_checkpoint(0) is None
    run.save_checkpoint(0, 5, weights(), {})
    assert run.load_checkpoint(1) is None
    assert run.load_checkpoint(0)[0] == 5


def names(run) -> list[str]:
    return sorted(p.name for p in (run.folder / "checkpoints").iterdir())


def test_the_last_two_are_kept(run):
    for stage, update in [(0, 90), (0, 100), (0, 1000), (1, 5), (1, 10)]:
        run.save_checkpoint(stage, update, weights(update), {})
    assert names(run) == ["stage-01-update-0000005", "stage-01-update-0000010"]
    assert run.load_checkpoint(1)[0] == 10 and run.load_checkpoint(0) is None
    run.save_checkpoint(1, 10, weights(77), {"again": True})
    update, tensors, state = run.load_checkpoint(1)
    assert state == {"again": True} and bits(tensors) == bits(weights(77)) and len(names(run)) == 2


def test_a_save_that_fails_harms_nothing(run):
    run.save_checkpoint(0, 1, weights(1), {})
    run.save_checkpoint(0, 2, weights(2), {})
    before = tree(run.folder)
    with pytest.raises(TypeError):
        run.save_checkpoint(0, 3, weights(3), {"no json": object()})
    assert tree(run.folder) == before


def torn(path):
    path.write_bytes(path.read_bytes()[:-5])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x10
    path.write_bytes(bytes(content))


def missing(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [torn, flipped, missing, empty])
@pytest.mark.parametrize("file", ["student.safetensors", "ema.safetensors", "checkpoint.json"])
def test_a_harmed_checkpoint_gives_way_to_the_one_before(run, caplog, harm, file):
    run.save_checkpoint(0, 10, weights(10), {"ema_step": 10})
    run.save_checkpoint(0, 20, weights(20), {"ema_step": 20})
    harm(run.folder / "checkpoints" / "stage-00-update-0000020" / file)
    with caplog.at_level(logging.WARNING, "diffkd"):
        update, tensors, state = run.load_checkpoint(0)
    assert update == 10 and state == {"ema_step": 10} and bits(tensors) == bits(weights(10))
    assert len(caplog.records) == 1 and "stage-00-update-0000020" in caplog.text


@pytest.mark.parametrize(
    ("old", "new"), [('"ema_step": 20', '"ema_step": 28'), ('"update": 20', '"update": 28')]
)
def test_a_number_that_changed_in_checkpoint_json_is_seen(run, caplog, old, new):
    """One bit of a digit: it is still JSON, and no safetensors file says otherwise."""
    run.save_checkpoint(0, 10, weights(10), {"ema_step": 10})
    run.save_checkpoint(0, 20, weights(20), {"ema_step": 20})
    path = run.folder / "checkpoints" / "stage-00-update-0000020" / "checkpoint.json"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    assert run.load_checkpoint(0)[0] == 10
    assert "stage-00-update-0000020" in caplog.text


def test_where_all_are_harmed_the_stage_starts_again(run, caplog):
    for update in (10, 20):
        run.save_checkpoint(0, update, weights(update), {})
    for path in run.folder.rglob("ema.safetensors"):
        flipped(path)
    assert run.load_checkpoint(0) is None
    assert "0000010" in caplog.text and "0000020" in caplog.text


# log --------------------------------------------------------------------------------------------------


def test_the_log_is_rewound_to_the_checkpoint(run):
    kept = [
        {"event": "start"},
        {"stage_index": 0, "update": 100, "loss": 1.0},
        {"stage_index": 1, "update": 10, "loss": 0.5},
    ]
    dropped = [{"stage_index": 1, "update": 11}, {"stage_index": 2, "update": 1}]
    for record in [kept[0], kept[1], dropped[1], kept[2], dropped[0]]:
        run.append(record)
    with (run.folder / "log.jsonl").open("a") as stream:
        stream.write('{"stage_index": 1, "upda')
    run.rewind_log(1, 10)
    run.append({"stage_index": 1, "update": 20})
    lines = (run.folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [*kept, {"stage_index": 1, "update": 20}]


def test_a_torn_line_in_the_middle_is_dropped(run):
    run.append({"stage_index": 0, "update": 1})
    with (run.folder / "log.jsonl").open("ab") as stream:
        stream.write(b'{"stage_ind\n' + b"\0" * 40 + b"\n\n")
    run.append({"stage_index": 0, "update": 2})
    run.rewind_log(0, 2)
    lines = (run.folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lines] == [1, 2]


def test_no_log_is_no_error(run):
    run.rewind_log(0, 0)
    assert not (run.folder / "log.jsonl").exists()


# where the code is from -------------------------------------------------------------------------------


def git(folder, *arguments) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    ran = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return ran.stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with a package in it, which `commit()` takes for its own."""
    package = tmp_path / "repo" / "package"
    package.mkdir(parents=True)
    (package / "runs.py").write_text("a = 1\n")
    git(package.parent, "init", "-q", "-b", "main")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-q", "-m", "first")
    monkeypatch.setattr(runs, "__file__", str(package / "runs.py"))
    return package


def test_the_commit_is_gits(checkout):
    head = git(checkout, "rev-parse", "HEAD")
    assert runs.commit() == head
    (checkout.parent / "elsewhere.txt").write_text("no code")
    assert runs.commit() == head
    (checkout / "runs.py").write_text("a = 2\n")
    assert runs.commit() == head + "+"


def test_a_new_file_of_code_is_a_change(checkout):
    (checkout / "new.py").write_text("")
    assert runs.commit() == git(checkout, "rev-parse", "HEAD") + "+"


def test_no_commit_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    assert runs.commit() is None


def test_the_commit_of_a_project_that_it_is_installed_in_is_not_its_own(checkout, monkeypatch):
    """A virtual environment inside somebody's repository, ignored there."""
    installed = checkout.parent / ".venv" / "diffkd"
    installed.mkdir(parents=True)
    (installed / "runs.py").write_text("")
    (checkout.parent / ".gitignore").write_text(".venv/\n")
    monkeypatch.setattr(runs, "__file__", str(installed / "runs.py"))
    assert runs.commit() is None


def test_no_commit_without_git(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert runs.commit() is None


def test_versions_are_those_that_run():
    import diffusers
    import numpy
    import PIL

    import diffkd

    found = runs.versions()
    assert found["python"] == platform.python_version()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["diffusers"] == diffusers.__version__ and found["numpy"] == numpy.__version__
    assert found["pillow"] == PIL.__version__ and found["diffkd"] == diffkd.__version__


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    for place in ("checkpoints/.stage-00-update-0000001.999.tmp", "students/.4-steps.999.tmp"):
        (tmp_path / "run" / place).mkdir(parents=True)
    (tmp_path / "run/.metrics.json.999.tmp").write_text("[")
    (tmp_path / "run/config.yaml").write_text("{}")
    runs.Run(tmp_path / "run", {}).close()
    assert [p for p in (tmp_path / "run").rglob("*.tmp")] == []
