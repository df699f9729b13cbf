"""Parts and records of a drawing that was stopped: no image is lost without a word."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from diffkd.errors import Unfinished, UserError
from diffkd.generation.npz_writer import NpzWriter
from diffkd.generation.resume import RECORD, read_record
from tests.refusals import tree

SETTINGS = {"model": "a", "steps": 4}


def part(folder):
    folder.mkdir()
    np.save(folder / "000000000-000000002.npy", np.zeros((2, 4, 4, 1), np.uint8))


@pytest.mark.parametrize("record", [None, "", "{", "[]", '{"drawn": {}}'])
def test_parts_without_their_record_are_not_deleted(tmp_path, record):
    part(tmp_path / ".x.npz.parts")
    if record is not None:
        (tmp_path / ".x.npz.parts" / RECORD).write_text(record)
    writer = NpzWriter(tmp_path / "x.npz")
    with pytest.raises(UserError, match=r"has parts in \.x\.npz\.parts without a record .*--overwrite"):
        writer.plan(SETTINGS, 4, overwrite=False)
    assert writer.plan(SETTINGS, 4, overwrite=True).clear


@pytest.mark.parametrize(("number", "kind"), [(errno.EACCES, UserError), (errno.EIO, Unfinished)])
def test_a_record_that_cannot_be_read_is_not_taken_for_none(tmp_path, monkeypatch, number, kind):
    (tmp_path / RECORD).write_text(json.dumps({"drawn": SETTINGS, "images": 4, "complete": False}))
    real = os.open

    def refusing(path, *args, **options):
        if Path(os.fsdecode(path)).name == RECORD:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(kind, match=f"{RECORD} cannot be read"):
        read_record(tmp_path / RECORD)


@pytest.mark.parametrize("dangling", [False, True])
def test_parts_are_not_written_through_a_link(tmp_path, dangling):
    elsewhere = tmp_path / "elsewhere"
    if not dangling:
        part(elsewhere)
        (elsewhere / ".mine.tmp").write_text("precious")
    before = tree(tmp_path)
    (tmp_path / ".x.npz.parts").symlink_to(elsewhere)
    writer = NpzWriter(tmp_path / "x.npz")
    with pytest.raises(UserError, match="parts is a symbolic link, and parts are not written through one"):
        writer.start(SETTINGS, 4, True, writer.plan(SETTINGS, 4, overwrite=True))
    (tmp_path / ".x.npz.parts").unlink()
    assert tree(tmp_path) == before
