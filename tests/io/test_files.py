"""Files and folders that are complete or absent."""

from __future__ import annotations

import errno
import os
import stat

import pytest
from safetensors import SafetensorError

from diffkd.io import files
from diffkd.io.files import new_file, new_folder, read_json, write_json
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
    assert files.is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert files.is_disk_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert files.is_disk_full(SafetensorError("I/O error: No space left on device (os error 28)"))
    assert not files.is_disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not files.is_disk_full(ValueError("28"))


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
    assert files.format_bytes(size) == text
