"""The errors of systems and libraries in one line: by number, by message, behind other errors."""

from __future__ import annotations

import errno
import os

import pytest

from diffkd.errors import Unfinished, UserError
from diffkd.io.system_errors import CAUSES, explained, is_disk_full, system_error


@pytest.mark.parametrize("number", sorted(errno.errorcode), ids=errno.errorcode.get)
def test_every_number_is_one_line_that_names_the_file(number):
    error = explained(OSError(number, os.strerror(number), "folder/file"))
    assert isinstance(error, UserError | Unfinished) and "\n" not in str(error)
    assert "folder/file" in str(error)
    if number in CAUSES:
        assert CAUSES[number].remedy in str(error)
        assert isinstance(error, UserError) == CAUSES[number].lasting


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError("270000 requested and 12160 written"),  # numpy.save and tofile
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
    RuntimeError('Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space" })'),
    RuntimeError("[Errno 28] Error writing bytes to file"),  # pyarrow
]


@pytest.mark.parametrize("error", FULL, ids=[type(e).__name__ + str(e)[:12] for e in FULL])
def test_a_full_disk_in_all_its_words(error):
    assert is_disk_full(error) and isinstance(explained(error), Unfinished)
    try:
        try:
            raise error
        finally:
            raise ValueError("Can't close the ZIP file")  # zipfile's, on top of the error itself
    except ValueError as hidden:
        assert is_disk_full(hidden) and isinstance(explained(hidden), Unfinished)


def test_only_a_full_disk_is_found_behind_another_error():
    """A file that was looked for in vain is no reason for what failed later."""
    try:
        try:
            raise FileNotFoundError(errno.ENOENT, "No such file", "cache")
        except OSError:
            raise KeyError("a fault of ours")  # noqa: B904
    except KeyError as error:
        assert system_error(error) is None and explained(error) is None


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError("Unable to allocate 149. GiB for an array"), "149. GiB"),
        (MemoryError(), "out of memory; use a smaller batch"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "smaller batch"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "smaller batch"),
        (ModuleNotFoundError("No module named 'diffusers'"), "No module named 'diffusers'"),
        (OSError("cannot identify image file"), "cannot identify image file"),
        (ValueError("embedded null byte"), "embedded null byte"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (RuntimeError("Symlink loop from '/x/circle'"), "round in a circle"),
    ],
)
def test_what_libraries_raise(error, says):
    line = explained(error)
    assert line is not None and says in str(line) and "\n" not in str(line)


@pytest.mark.parametrize(
    "error", [KeyError("x"), ZeroDivisionError(), RecursionError(), EOFError(), SystemExit(3)]
)
def test_faults_of_our_own_are_not_explained_away(error):
    assert explained(error) is None


def test_of_two_files_the_one_that_was_written_is_named():
    assert "there" in str(explained(OSError(errno.ENOSPC, "", "here", None, "there")))
