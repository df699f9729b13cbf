"""The run folder: one config, one owner at a time, a log without duplicates."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from diffkd.errors import Unfinished, UserError
from diffkd.training import run_folder
from diffkd.training.config import Training
from diffkd.training.run_files import FILES, FOLDERS, TRACKERS
from diffkd.training.run_folder import RunFolder
from tests.edits import edits
from tests.refusals import tree

CONFIG = {
    "out": "x",
    "seed": 0,
    "method": [{"name": "progressive", "steps": [4, 2]}],
    "training": {"ema": 0.99},
}


@pytest.fixture
def run(tmp_path):
    held = RunFolder(tmp_path / "run", CONFIG)
    yield held
    held.close()


# the folder and its config ----------------------------------------------------------------------------


def test_the_same_config_opens_the_run_again(tmp_path):
    RunFolder(tmp_path / "run", CONFIG).close()
    before = tree(tmp_path)
    RunFolder(tmp_path / "run", json.loads(json.dumps(CONFIG))).close()
    assert tree(tmp_path) == before


def test_an_empty_folder_may_become_a_run(tmp_path):
    RunFolder(tmp_path, CONFIG).close()
    assert (tmp_path / "config.yaml").is_file()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 1}, r"seed was 0, now 1"),
        ({"training": {"ema": 0.5}}, r"training\.ema was 0\.99, now 0\.5"),
        ({"method": [{"name": "progressive", "steps": [4, 1]}]}, r"method.*\[4, 2\].*\[4, 1\]"),
        ({"training": {}}, r"training\.ema was 0\.99, now None"),
        ({"training": None}, r"training was .*, now None"),
    ],
)
def test_another_config_is_refused_by_its_key(tmp_path, changed, named):
    RunFolder(tmp_path / "run", CONFIG).close()
    before = tree(tmp_path)
    with pytest.raises(UserError, match=named):
        RunFolder(tmp_path / "run", {**CONFIG, **changed})
    assert tree(tmp_path) == before


HARMLESS = {"training": {"ema": 0.99, "log_every": 5}, "evaluation": {"samples": 7}}


def test_a_harmless_change_is_refused_unless_it_is_allowed(tmp_path, caplog):
    RunFolder(tmp_path / "run", CONFIG).close()
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"training\.log_every was None, now 5.*use --allow to resume"):
        RunFolder(tmp_path / "run", {**CONFIG, **HARMLESS})
    assert tree(tmp_path) == before
    RunFolder(tmp_path / "run", {**CONFIG, **HARMLESS}, allow=True).close()
    assert "resumes with another config: evaluation was None" in caplog.text
    RunFolder(tmp_path / "run", {**CONFIG, **HARMLESS}).close()  # which is the run's now


def test_a_default_that_is_now_derived_is_no_change(tmp_path, caplog):
    """Older runs recorded evaluation.sampler: ddim, which null means for their students too."""
    measured = {"samples": 7, "sampler": "ddim"}
    RunFolder(tmp_path, {**CONFIG, "evaluation": measured}).close()
    RunFolder(tmp_path, {**CONFIG, "evaluation": {**measured, "sampler": None}}).close()
    assert not caplog.records
    with pytest.raises(UserError, match=r"evaluation\.sampler was None, now heun"):
        RunFolder(tmp_path, {**CONFIG, "evaluation": {**measured, "sampler": "heun"}})


def test_keys_that_an_older_run_knew_nothing_of_are_no_change(tmp_path, caplog):
    RunFolder(tmp_path, CONFIG).close()
    RunFolder(tmp_path, {**CONFIG, "pairs": None, "spread_every": 50}).close()
    assert not caplog.records


def test_what_changes_the_students_is_never_allowed(tmp_path):
    RunFolder(tmp_path / "run", CONFIG).close()
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"seed was 0, now 1.*use another out, or delete the folder"):
        RunFolder(tmp_path / "run", {**CONFIG, **HARMLESS, "seed": 1}, allow=True)
    assert tree(tmp_path) == before


def test_a_moved_run_resumes(tmp_path):
    RunFolder(tmp_path / "run", CONFIG).close()
    (tmp_path / "run").rename(tmp_path / "moved")
    RunFolder(tmp_path / "moved", {**CONFIG, "out": "moved"}).close()


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="not empty and does not hold a diffkd run"):
        RunFolder(tmp_path, CONFIG)
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "thesis.tex", CONFIG)
    assert tree(tmp_path) == {"thesis.tex": b""}


def test_another_process_is_kept_out(tmp_path, caplog):
    holder = textwrap.dedent(
        """
        import sys, json
        from pathlib import Path
        from diffkd.training.run_folder import RunFolder
        run = RunFolder(Path(sys.argv[1]), json.loads(sys.argv[2]))
        print("held", flush=True)
        sys.stdin.read()
        """
    )
    command = [sys.executable, "-c", holder, str(tmp_path / "run"), json.dumps(CONFIG)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        named = rf"process {other.pid} on {socket.gethostname()} \(since 20"
        with pytest.raises(UserError, match=rf"run is in use by {named}"):
            RunFolder(tmp_path / "run", CONFIG)
        assert not caplog.records
        other.kill()  # a lock dies with its process: no stale lock to be removed by hand
        other.wait()
        RunFolder(tmp_path / "run", CONFIG).close()
        assert len(caplog.records) == 1 and "which has ended: taken over" in caplog.text
        assert f"process {other.pid} on" in caplog.text
    RunFolder(tmp_path / "run", CONFIG).close()
    assert len(caplog.records) == 1  # who lets go leaves nothing to take over


@pytest.mark.parametrize("content", [b"", b"\0" * 80, b"[1]", b'{"host": "a"}'])
def test_a_torn_owner_record_does_not_block_the_folder(tmp_path, caplog, content):
    (tmp_path / ".owner.json").write_bytes(content)
    RunFolder(tmp_path, CONFIG).close()
    assert "locked by process ? on ?" in caplog.text and not (tmp_path / ".owner.json").exists()


@pytest.mark.parametrize(
    ("host", "process", "held"),
    [
        ("here", "own", True),
        ("here", "gone", False),
        ("elsewhere", "gone", True),  # nobody here can say
    ],
)
def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog, host, process, held):
    """There the owner's own record decides."""

    def none(self, timeout=None):
        raise NotImplementedError("no flock")

    monkeypatch.setattr("filelock.FileLock.acquire", none)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    owner = {
        "host": socket.gethostname() if host == "here" else host,
        "process": os.getpid() if process == "own" else gone.pid,
        "since": "yesterday",
    }
    (tmp_path / ".owner.json").write_text(json.dumps(owner))
    if held:
        with pytest.raises(UserError, match=r"in use by process .*delete .*owner\.json"):
            RunFolder(tmp_path, CONFIG)
        assert json.loads((tmp_path / ".owner.json").read_text()) == owner
    else:
        RunFolder(tmp_path, CONFIG).close()
        assert "taken over" in caplog.text


def test_a_run_keeps_its_micro_batches(tmp_path, caplog):
    """By default one for each process; a run resumed with fewer or more processes keeps them if it can."""

    def begun(folder, parts, processes):
        run = RunFolder(folder, CONFIG)
        found = run.micro_batches(parts, processes)
        run.describe("cpu", processes, 1)
        run.close()
        return found

    assert begun(tmp_path / "two", 2, 2) == 2
    caplog.clear()
    assert begun(tmp_path / "two", 1, 1) == 2
    assert "other images" not in caplog.text
    assert begun(tmp_path / "one", 1, 1) == 1
    assert begun(tmp_path / "one", 2, 2) == 2
    assert "resumes with 2 micro-batches but began with 1, so other images" in caplog.text


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"\0\0"])
def test_files_torn_by_a_power_cut(run, content):
    """Nothing depends on files that only inform."""
    for name in ("environment.json", "inputs.json"):
        (run.folder / name).write_bytes(content)
    run.describe("cpu", 1, 1)
    run.check_inputs({"data": "a"})
    run.check_inputs({"data": "a"})
    (run.folder / "config.yaml").write_bytes(content)
    run.close()
    with pytest.raises(UserError, match=r"config\.yaml (is not valid YAML|holds no keys).*put it back"):
        RunFolder(run.folder, CONFIG)


@pytest.mark.parametrize(
    "line", ["3", "null", '"x"', '{"update": null}', '{"stage_index": "x"}', "[" * 5000, "\udcff"]
)
def test_foreign_lines_of_the_log_are_dropped(run, line):
    run.append({"stage_index": 0, "update": 1})
    with (run.folder / "log.jsonl").open("ab") as stream:
        stream.write(line.encode("utf-8", "surrogateescape") + b"\n")
    run.append({"stage_index": 0, "update": 2})
    run.rewind_log(0, 2)
    lines = (run.folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lines] == [1, 2]


def test_metrics_by_another_protocol_are_set_aside(tmp_path):
    run = RunFolder(tmp_path, CONFIG)
    run.close()
    (tmp_path / "metrics.json").write_text("[1]")
    RunFolder(tmp_path, {**CONFIG, "training": {"ema": 0.99, "log_every": 3}}, allow=True).close()
    assert (tmp_path / "metrics.json").exists()
    other = {**CONFIG, "training": {"ema": 0.99, "log_every": 3}, "evaluation": {"samples": 5}}
    RunFolder(tmp_path, other, allow=True).close()
    assert not (tmp_path / "metrics.json").exists()
    assert (tmp_path / "metrics-before-1.json").read_text() == "[1]"


def test_a_changed_environment_gets_a_warning(run, caplog):
    run.describe("cpu", 1, 2)
    run.describe("cpu", 1, 2)
    assert not caplog.records
    path = run.folder / "environment.json"
    content = json.loads(path.read_text())
    content["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(content))
    run.describe("cpu", 2, 1)
    assert len(caplog.records) == 1
    for words in (
        "the last bits",
        "versions.torch was 1.0, now 2",
        "processes was 1, now 2",
        "threads was 2",
    ):
        assert words in caplog.text


def test_other_data_under_the_same_name_is_refused(run):
    run.check_inputs({"data": "a", "teacher": "b"})
    run.check_inputs({"data": "a", "teacher": "b"})
    with pytest.raises(UserError, match=r"the teacher of .*run has changed since the run began; put it back"):
        run.check_inputs({"data": "a", "teacher": "c"})
    with pytest.raises(UserError, match="the data of"):
        run.check_inputs({"data": "x", "teacher": "b"})


def test_the_environment_is_written_once(run):
    run.describe("cpu")
    first = json.loads((run.folder / "environment.json").read_text())
    run.describe("cuda:7")
    assert json.loads((run.folder / "environment.json").read_text()) == first
    assert first["device"] == "cpu" and first["command"] == sys.argv
    assert first["versions"]["torch"] == importlib.metadata.version("torch")


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


def test_a_missing_log_is_not_an_error(run):
    run.rewind_log(0, 0)
    assert not (run.folder / "log.jsonl").exists()


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    for place in ("checkpoints/.stage-00-update-0000001.999.tmp", "students/.4-steps.999.tmp"):
        (tmp_path / "run" / place).mkdir(parents=True)
    (tmp_path / "run/.metrics.json.999.tmp").write_text("[")
    (tmp_path / "run/students/2-steps").mkdir()
    (tmp_path / "run/students/.2-steps.999.old").mkdir()
    (tmp_path / "run/students/2-steps/.README.md.999.tmp").write_text("# A")
    (tmp_path / "run/.mine.tmp").write_text("of the user's own")
    (tmp_path / "run/config.yaml").write_text("{}")
    RunFolder(tmp_path / "run", {}).close()
    left = [p.name for p in (tmp_path / "run").rglob(".*") if p.suffix in (".tmp", ".old")]
    assert left == [".mine.tmp"]


# what would stop the run later ------------------------------------------------------------------------


def to_itself(path, elsewhere):
    path.symlink_to(path.name)


def out_of_the_run(path, elsewhere):
    elsewhere.mkdir()
    path.symlink_to(elsewhere)


def to_nothing(path, elsewhere):
    path.symlink_to(elsewhere)


def of_the_other_kind(path, elsewhere):
    path.mkdir() if path.name in FILES else path.write_text("")


def a_pipe(path, elsewhere):
    os.mkfifo(path)


PLACES = [name for name in FILES if name != "config.yaml"] + [*FOLDERS, "students/4-steps"]


@pytest.mark.parametrize("made", [to_itself, out_of_the_run, to_nothing, of_the_other_kind, a_pipe])
@pytest.mark.parametrize("name", PLACES)
def test_places_that_are_not_what_they_should_be(tmp_path, name, made):
    RunFolder(tmp_path / "run", CONFIG).close()
    path = tmp_path / "run" / name
    path.parent.mkdir(exist_ok=True)
    made(path, tmp_path / "elsewhere")
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    if name == "students/4-steps" and made in (of_the_other_kind, a_pipe):
        RunFolder(tmp_path / "run", CONFIG).close()  # a file of the user's beside the students
        return
    with pytest.raises(UserError, match=rf"{name} is (a symbolic link|not a f)"):
        RunFolder(tmp_path / "run", CONFIG)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


def test_links_inside_the_run_are_the_users_own(tmp_path):
    """Such as one to the best student."""
    (tmp_path / "disk" / "students" / "4-steps").mkdir(parents=True)
    (tmp_path / "disk" / "config.yaml").write_text("{a: 1}")
    (tmp_path / "disk" / "students" / "best").symlink_to("4-steps")
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    RunFolder(tmp_path / "run", {"a": 1}).close()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("name", ["log.jsonl", "metrics.json", "inputs.json", "checkpoints", "students"])
def test_places_that_cannot_be_used(tmp_path, monkeypatch, name, number):
    """As those of another user: found before anything is trained, whatever the permissions of this one."""
    RunFolder(tmp_path, CONFIG).close()
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
    for file in ("log.jsonl", "metrics.json", "inputs.json"):
        (tmp_path / file).write_text("[]")

    def refused(error):
        raise OSError(number, os.strerror(number), name)

    real_open, real_temporary = Path.open, tempfile.TemporaryFile
    monkeypatch.setattr(
        Path, "open", lambda p, *a, **k: refused(p) if p.name == name else real_open(p, *a, **k)
    )
    monkeypatch.setattr(
        tempfile, "TemporaryFile", lambda dir: refused(dir) if dir.name == name else real_temporary(dir=dir)
    )
    with pytest.raises(UserError if number != errno.EIO else Unfinished, match=f"{name} cannot be "):
        RunFolder(tmp_path, CONFIG)


@pytest.mark.parametrize("content", ["", "[1,]", "{}", '{"model": "a"}', "null", "[" * 5000, "\ufeff[]"])
def test_records_that_are_none_stop_the_run_before_it_trains(tmp_path, content):
    RunFolder(tmp_path, CONFIG).close()
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(
        UserError, match=r"metrics\.json is not a list of records .*; repair it, or move it away"
    ):
        RunFolder(tmp_path, CONFIG)
    assert (tmp_path / "metrics.json").read_text() == content


def test_notes_are_no_records(run):
    notes = ["mine", {"note": "mine"}, {"model": 3, "role": "teacher"}, {"model": "x"}, 1, None]
    own = {"model": "a", "role": "teacher", "fid": 1.0}
    (run.folder / "metrics.json").write_text(json.dumps([*notes, own]))
    assert run.records() == [own]
    run.check_records(["teacher"], ["fid"])
    run.add_record({"model": "b", "role": "student", "fid": 2})
    assert json.loads((run.folder / "metrics.json").read_text())[:7] == [*notes, own]


@pytest.mark.parametrize("value", [None, "1", True, [], float("nan"), float("inf"), 10**400])
def test_a_record_whose_number_is_none(run, value):
    records = [{"model": "a", "role": role, "fid": value} for role in ("evaluated", "student")]
    (run.folder / "metrics.json").write_text(json.dumps(records[:1]))
    run.check_records(["student"], ["fid"])  # by another command: not this run's own
    (run.folder / "metrics.json").write_text(json.dumps(records))
    with pytest.raises(UserError, match="the record of 'a' has fid .*, which is not a number; remove"):
        run.check_records(["student"], ["fid"])


def use(folder):
    """What every run does with its files before and while it trains."""
    run = RunFolder(folder, CONFIG)
    try:
        run.check_inputs({"data": "a", "teacher": "b"})
        parts = run.micro_batches(1, 1)
        Training(batch_size=16).model_copy(update={"micro_batches": parts}).parts(1)
        run.describe("cpu", 1, 1)
        run.check_records(["teacher", "student"], ["steps", "nfe", "fid"])
        run.rewind_log(0, 1)
        run.append({"stage_index": 0, "update": 2})
    finally:
        run.close()


@pytest.mark.parametrize("name", [name for name in FILES if name != TRACKERS])  # read by trackers alone
def test_every_edit_is_lived_with_or_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(run_folder, "commit", lambda: "0" * 40)  # it asks git each time
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    use(tmp_path / "before")
    numbers = {"steps": 4, "nfe": 4, "fid": 1.5, "protocol": {"features": {"name": "digits"}}}
    measured = [{"model": role, "role": role, **numbers} for role in ("teacher", "student")]
    (tmp_path / "before/metrics.json").write_text(json.dumps(measured, indent=2))
    seen = {True: 0, False: 0}
    for what, text in edits((tmp_path / "before" / name).read_text()):
        run = tmp_path / what.encode().hex()[:200]
        shutil.copytree(tmp_path / "before", run)
        (run / name).write_text(text, encoding="utf-8", errors="surrogatepass")
        before = (run / name).read_bytes()
        try:
            use(run)
        except UserError:
            assert (run / name).read_bytes() == before, what
            seen[False] += 1
        else:
            seen[True] += 1
        shutil.rmtree(run)
    assert seen[True] and (name == "log.jsonl" or seen[False])
