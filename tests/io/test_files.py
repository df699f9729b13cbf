"""Files and folders that are complete or absent."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from diffkd.errors import Unfinished, UserError
from diffkd.io import files
from diffkd.io.files import append_json, new_file, new_folder, read_json, write_json
from diffkd.io.lock import Lock
from diffkd.io.system_errors import is_disk_full
from diffkd.io.text import format_bytes, read_text
from tests.refusals import tree


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
    with pytest.raises(AssertionError, match="was not written"), new_file(tmp_path / "file.txt"):
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
    """Results kept on another disk by a link stay there."""
    (tmp_path / "disk" / "folder").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "folder")
    with new_folder(tmp_path / "link") as temporary:
        (temporary / "a").write_bytes(b"1")
    assert (tmp_path / "link").is_symlink() and tree(tmp_path / "disk" / "folder") == {"a": b"1"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "link"]
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["folder"]


def test_leftovers_of_a_killed_process_do_not_interfere(tmp_path):
    """A temporary folder of an earlier process with the same id, as after a reboot."""
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


def test_a_folder_killed_while_being_replaced_is_restored(tmp_path):
    """Killed between the two renames: the old one is whole, and there is no new one."""
    (tmp_path / ".4-steps.77.old").mkdir()
    (tmp_path / ".4-steps.77.old" / "a").write_bytes(b"1")
    (tmp_path / ".4-steps.77.tmp").mkdir()
    files.remove_leftovers(tmp_path)
    assert tree(tmp_path) == {"4-steps": None, "4-steps/a": b"1"}
    (tmp_path / ".4-steps.78.old").mkdir()
    files.remove_leftovers(tmp_path)
    assert tree(tmp_path) == {"4-steps": None, "4-steps/a": b"1"}


def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "a.json", [1])
    with new_folder(tmp_path / "b") as temporary:
        (temporary / "c").write_bytes(b"1")
    assert read_json(tmp_path / "a.json", None) == [1] and (tmp_path / "b/c").read_bytes() == b"1"


def test_a_full_disk_is_recognised_in_any_message():
    assert is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert is_disk_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert is_disk_full(SafetensorError("I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not is_disk_full(ValueError("28"))


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.9, "1 kB"),
        (999_700, "1 MB"),
        (1000, "1 kB"),
        (1234567, "1.23 MB"),
        (10**9, "1 GB"),
        (5 * 10**13, "50 TB"),
    ],
)
def test_sizes_are_shown_with_three_digits(size, text):
    assert format_bytes(size) == text


# permissions ------------------------------------------------------------------------------------------


@pytest.fixture
def umask():
    """umask(mask) until the test ends."""
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o027, 0o077])
def test_files_follow_the_umask_whatever_a_library_gives_them(tmp_path, umask, mask):
    """safetensors and tempfile make files that only their owner reads."""
    umask(mask)
    with new_file(tmp_path / "alone") as temporary:
        temporary.unlink()
        save_file({"w": torch.zeros(3)}, temporary)
    with new_folder(tmp_path / "folder") as temporary:
        (temporary / "deep").mkdir()
        for path in (temporary / "w.safetensors", temporary / "deep/w.safetensors"):
            save_file({"w": torch.zeros(3)}, path)
        handle, name = tempfile.mkstemp(dir=temporary)
        os.close(handle)
        (temporary / "plain").write_text("")
    made = [tmp_path / "alone", *(p for p in (tmp_path / "folder").rglob("*") if p.is_file())]
    assert len(made) == 5 and {stat.S_IMODE(p.stat().st_mode) for p in made} == {0o666 & ~mask}
    folders = [tmp_path / "folder", tmp_path / "folder/deep"]
    assert {stat.S_IMODE(p.stat().st_mode) for p in folders} == {0o777 & ~mask}


def test_a_folder_that_hands_its_group_on_keeps_doing_so(tmp_path, umask):
    umask(0o002)
    tmp_path.chmod(0o2775)
    with new_folder(tmp_path / "folder") as temporary:
        (temporary / "deep").mkdir()
    assert all(p.stat().st_mode & stat.S_ISGID for p in (tmp_path / "folder", tmp_path / "folder/deep"))


# what killed processes left ---------------------------------------------------------------------------


KILLED = """
import os, signal, sys
from pathlib import Path
from diffkd.io.files import {kind}
with {kind}(Path(sys.argv[1])) as temporary:
    (temporary if temporary.is_file() else temporary / "weights").write_text("half")
    print(temporary.name, flush=True)
    {end}
"""


def writing(path, end, kind="new_file"):
    command = [sys.executable, "-c", KILLED.format(end=end, kind=kind), str(path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_next_process_removes_what_a_killed_one_left_and_no_other(tmp_path):
    path = tmp_path / "ref.npz"
    with writing(path, "os.kill(os.getpid(), signal.SIGKILL)") as killed:
        left = killed.stdout.readline().strip()
    (tmp_path / ".ref.npz.mine.tmp").write_text("of the user's own")
    (tmp_path / ".other.npz.99.tmp").write_text("half")  # its own next command removes it
    (tmp_path / ".ref.npz.98.old").write_text("not a temporary file")
    kept = {".ref.npz.mine.tmp", ".other.npz.99.tmp", ".ref.npz.98.old"}
    assert {p.name for p in tmp_path.iterdir()} == {left, *kept}
    with writing(path, "sys.stdin.readline()") as living:
        alive = living.stdout.readline().strip()
        with new_file(path) as temporary:
            temporary.write_text("ours")
        assert {p.name for p in tmp_path.iterdir()} == {"ref.npz", alive, *kept}
        living.stdin.write("\n")
        living.stdin.close()
        assert living.wait(60) == 0
    assert path.read_text() == "half"  # the last one to finish
    assert {p.name for p in tmp_path.iterdir()} == {"ref.npz", *kept}


def test_the_next_process_removes_a_folder_that_a_killed_one_left_and_no_other(tmp_path):
    """Gigabytes, of an export that was killed."""
    path = tmp_path / "student"
    with writing(path, "os.kill(os.getpid(), signal.SIGKILL)", kind="new_folder") as killed:
        left = killed.stdout.readline().strip()
    assert tree(tmp_path) == {left: None, f"{left}/weights": b"half"}
    with writing(path, "sys.stdin.readline()", kind="new_folder") as living:
        alive = living.stdout.readline().strip()
        for folder in (path, tmp_path / "other"):
            with new_folder(folder) as temporary:
                (temporary / "weights").write_text("ours")
        names = {"student", "other", alive}
        assert {p.name for p in tmp_path.iterdir()} == names
        living.stdin.write("\n")
        living.stdin.close()
        assert living.wait(60) == 0
    assert (path / "weights").read_text() == "half"  # the last one to finish
    assert {p.name for p in tmp_path.iterdir()} == {"student", "other"}


def test_a_folder_that_a_process_takes_away_before_it_is_locked(tmp_path, monkeypatch):
    real, calls = os.open, []

    def opened(path, flags, *rest, **more):
        if str(path).endswith(".tmp") and len(calls) < 2:
            calls.append(path)
            descriptor = real(path, flags, *rest, **more) if len(calls) == 2 else None
            os.rmdir(path)
            if descriptor is not None:
                return descriptor
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(files.os, "open", opened)
    with new_folder(tmp_path / "a") as temporary:
        (temporary / "b").write_bytes(b"1")
    assert tree(tmp_path) == {"a": None, "a/b": b"1"} and len(calls) == 2


def test_a_file_system_without_locks_removes_nothing_of_others(tmp_path, monkeypatch):
    def none(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    (tmp_path / ".a.json.99.tmp").write_text("perhaps of a living process on another host")
    (tmp_path / ".b.99.tmp").mkdir()
    write_json(tmp_path / "a.json", [1])
    with new_folder(tmp_path / "b"):
        pass
    assert read_json(tmp_path / "a.json", None) == [1] and (tmp_path / "b").is_dir()
    assert (tmp_path / ".a.json.99.tmp").exists() and (tmp_path / ".b.99.tmp").exists()


def test_one_that_a_process_takes_away_before_it_is_locked(tmp_path, monkeypatch):
    real, calls = fcntl.flock, []

    def flock(descriptor, operation):
        calls.append(operation)
        if len(calls) == 1:
            next(tmp_path.glob(".a.json.*.tmp")).unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    write_json(tmp_path / "a.json", [1])
    assert tree(tmp_path) == {"a.json": b"[\n  1\n]\n"} and len(calls) == 2


# links ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("name", ["a.json", f".a.json.{os.getpid()}.tmp"], ids=["the file", "its temporary"])
def test_a_file_replaces_a_link_and_is_not_written_through_it(tmp_path, name, dangling):
    victim = tmp_path / "elsewhere" / "victim"
    victim.parent.mkdir()
    if not dangling:
        victim.write_text("precious")
    (tmp_path / name).symlink_to(victim)
    write_json(tmp_path / "a.json", [1])
    assert tree(tmp_path / "elsewhere") == ({} if dangling else {"victim": b"precious"})
    assert (tmp_path / "a.json").read_text() == "[\n  1\n]\n" and not (tmp_path / "a.json").is_symlink()


@pytest.mark.parametrize("name", [".lock", ".a.json.lock"])
def test_a_lock_is_not_made_through_a_link(tmp_path, name):
    (tmp_path / name).symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=f"{name} is a symbolic link"):
        if name == ".lock":
            Lock(tmp_path, tmp_path, "wait").take()
        else:
            append_json(tmp_path / "a.json", 1)
    assert [p.name for p in tmp_path.iterdir()] == [name]


# records and locks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{}", '{"a": 1}', "null", "[1,]", "\ufeff[]", "3"])
def test_a_record_is_not_added_to_what_is_no_list(tmp_path, content):
    """Which would be lost."""
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"a\.json is not a list of records .*; repair it, or move it away"):
        append_json(path, 1)
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("number", "kind", "says"),
    [
        (errno.EACCES, UserError, "permission denied; use another place, or ask its owner"),
        (errno.EROFS, UserError, "its file system is read-only"),
        (errno.ENOSPC, Unfinished, "the disk is full"),
        (errno.EIO, Unfinished, "the disk failed"),
    ],
)
@pytest.mark.parametrize("file", [".lock", ".owner.json"])
def test_a_folder_that_cannot_be_locked(tmp_path, monkeypatch, file, number, kind, says):
    """As one of another user's, or on a disk that can be read only."""
    real = os.open

    def refusing(path, flags, *args, **options):
        if file in str(path) and flags & os.O_CREAT:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refusing)
        with pytest.raises(kind, match=rf"run cannot be locked by .*{file}: {says}"):
            Lock(tmp_path, Path("run"), "wait").take()
    assert not list(tmp_path.iterdir())
    lock = Lock(tmp_path, Path("run"), "wait")
    lock.take()
    lock.release()


@pytest.mark.parametrize("process", [0, -1, 1 << 31, 10**40, "1", None, [], 1.5, True])
def test_an_owner_that_was_edited(tmp_path, monkeypatch, process):
    """Where there are no locks, and its record decides."""
    monkeypatch.setattr("filelock.FileLock.acquire", Mock(side_effect=NotImplementedError))
    owner = {"host": socket.gethostname(), "process": process, "since": "yesterday"}
    write_json(tmp_path / ".owner.json", owner)
    with contextlib.suppress(UserError):  # or it is taken over
        Lock(tmp_path, tmp_path, "wait").take()


# what is no text --------------------------------------------------------------------------------------


def test_text_is_read_from_files_that_end(tmp_path):
    """A pipe would wait for ever, a device never ends, and a file of nothing but holes fills the memory."""
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "huge").open("wb") as stream:
        stream.truncate(1 << 36)
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero", "huge"):
        with pytest.raises(ValueError, match="it is a pipe, a socket or a device|it is 65536 MiB long"):
            read_text(tmp_path / name)
    for name, error in (("nothing", FileNotFoundError), (".", IsADirectoryError)):
        with pytest.raises(error):
            read_text(tmp_path / name)
    (tmp_path / "text").write_text("\u00fc\n")
    assert read_text(tmp_path / "text") == "\u00fc\n"
