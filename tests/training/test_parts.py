"""Checkpoints that several processes write, each its part: one tensor from many files, or the one before."""

from __future__ import annotations

import errno
import os
import shutil
import threading

import pytest
import torch
from safetensors import SafetensorError

from diffkd.errors import Unfinished, UserError
from diffkd.training import checkpoints
from diffkd.training.checkpoints import Checkpoints
from diffkd.training.team import Team
from tests.edits import edits
from tests.refusals import tree

CONFIG = {"out": "runs/x", "seed": 0, "evaluation": None}


class Threads(Team):
    """Threads that stand for processes. lost: the rank that never answers."""

    def __init__(self, rank, board, lost=None):
        super().__init__(rank, len(board.outcomes))
        self.board, self.lost = board, lost

    def _gathered(self, outcome):
        if self.lost is not None:
            raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
        return self.board.gathered(self.rank, outcome)


class Board:
    def __init__(self, world):
        self.outcomes, self.barrier = [None] * world, threading.Barrier(world, timeout=30)

    def gathered(self, rank, outcome):
        self.outcomes[rank] = outcome
        self.barrier.wait()
        found = list(self.outcomes)
        self.barrier.wait()
        return found


def together(work, world, **options):
    """What work(team) gives in each of so many processes; errors are results."""
    board, found = Board(world), [None] * world

    def run(rank):
        try:
            found[rank] = work(Threads(rank, board, **options))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def whole(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {
        "student": {
            "weight": torch.randn(7, 3, generator=rng), "turned": torch.randn(4, 9, generator=rng).T,
            "half": torch.randn(5, generator=rng).bfloat16(), "codes": torch.arange(6).to(torch.uint8),
            "one": torch.randn(1, 2, 2, generator=rng), "none": torch.empty(0, 3),
        },
        "student-optimizer": {"weight/step": torch.tensor(12.0), "count": torch.tensor(2**62 + 1)},
    }  # fmt: skip


def part(tensors, team):
    """The rows that FSDP2 gives a process; what all hold whole is the main one's."""
    shares = {}
    for name, values in tensors.items():
        shares[name] = {}
        for key, value in values.items():
            if value.ndim:
                size = -(-len(value) // team.world)
                shares[name][key] = value[team.rank * size : (team.rank + 1) * size]
            elif team.main:
                shares[name][key] = value
    return shares


def saved(folder, world, update, seed=None, **options):
    def work(team):
        store = Checkpoints(folder, CONFIG)
        store.save(0, update, part(whole(update if seed is None else seed), team), {"n": update}, team)
        store.wait()

    return together(work, world, **options)


def read(tensors):
    return {(name, key): value.whole() for name, values in tensors.items() for key, value in values.items()}


def assert_whole(found, update):
    expected = {(name, key): v for name, values in whole(update).items() for key, v in values.items()}
    got = read(found.tensors)
    assert found.update == update and found.state == {"n": update} and got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype and torch.equal(got[key], value), key


@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_rows_of_a_tensor_are_read_from_its_parts(tmp_path, world):
    """Whatever number of processes wrote them, where the last have fewer rows or none."""
    assert saved(tmp_path, world, 10) == [None] * world
    folder = tmp_path / "stage-00-update-0000010"
    names = {f"student-{rank:05d}-of-{world:05d}.safetensors" for rank in range(world)}
    names |= {f"student-optimizer-00000-of-{world:05d}.safetensors", "checkpoint.json"}
    assert {path.name for path in folder.iterdir()} == names
    found = Checkpoints(tmp_path, CONFIG).load(0)
    assert_whole(found, 10)
    for key, value in whole(10)["student"].items():
        for start in range(len(value)):
            for stop in range(start + 1, len(value) + 1):
                assert torch.equal(found.tensors["student"][key].rows(start, stop), value[start:stop])
    for one in together(lambda team: Checkpoints(tmp_path, CONFIG).load(0, team), world + 1):
        assert_whole(one, 10)


def test_the_disk_of_one_process_is_full(tmp_path, monkeypatch):
    """All say so, with what is needed in all; the last good one stays and nothing half written."""
    saved(tmp_path, 3, 10)
    before = tree(tmp_path)
    real = checkpoints.save_file

    def full(values, path):
        if "student-00001" in path.name:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        real(values, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    errors = saved(tmp_path, 3, 20)
    total = sum(value.nbytes for values in whole().values() for value in values.values())
    assert {type(error) for error in errors} == {Unfinished}
    for error in errors:
        assert f"needs {total} B and could not be written: the disk is full (" in str(error)
    assert tree(tmp_path) == before
    monkeypatch.undo()
    assert saved(tmp_path, 3, 20) == [None] * 3
    assert_whole(Checkpoints(tmp_path, CONFIG).load(0), 20)


def test_a_folder_that_is_not_shared(tmp_path):
    def work(team):
        store = Checkpoints(tmp_path / str(team.rank), CONFIG)
        store.save(0, 1, part(whole(), team), {}, team)
        store.wait()

    (tmp_path / "0").mkdir()
    shown = Threads.first

    def elsewhere(self, make):  # each looks for the name that the main one gave in a folder of its own
        path = shown(self, make)
        return tmp_path / str(self.rank) / path.name if hasattr(path, "name") else path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Threads, "first", elsewhere)
        errors = together(work, 2)
    assert {type(error) for error in errors} == {UserError}
    assert "process 1 does not see" in str(errors[0]) and "that all processes share" in str(errors[1])
    assert not list((tmp_path / "0").iterdir())


def test_a_process_that_is_gone(tmp_path):
    errors = saved(tmp_path, 2, 10, lost=1)
    assert [type(error) for error in errors] == [Unfinished] * 2
    assert "another process of this run is gone" in str(errors[0]) and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    for update in (10, 20):
        assert saved(folder, 2, update) == [None, None]
    return folder


def test_a_damaged_part_is_seen_by_all(two, tmp_path, caplog):
    """Whichever process verifies it: all fall back to the same checkpoint, and the main one says why."""
    for name in sorted(path.name for path in (two / "stage-00-update-0000020").iterdir()):
        for harm in ("flipped", "torn", "missing"):
            folder = tmp_path / f"{name}-{harm}"
            shutil.copytree(two, folder)
            path = folder / "stage-00-update-0000020" / name
            content = bytearray(path.read_bytes())
            content[-3] ^= 0x10
            path.write_bytes(content if harm == "flipped" else content[:-5])
            if harm == "missing":
                path.unlink()
            caplog.clear()
            for found in together(lambda team, at=folder: Checkpoints(at, CONFIG).load(0, team), 3):
                assert_whole(found, 10)
            assert len(caplog.records) == 1 and "stage-00-update-0000020" in caplog.text


def test_a_part_that_one_process_cannot_read_ends_the_run_in_all(two, monkeypatch):
    real = checkpoints.sha256

    def failing(path):
        if path.name.startswith("student-00001"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path)

    monkeypatch.setattr(checkpoints, "sha256", failing)
    for error in together(lambda team: Checkpoints(two, CONFIG).load(0, team), 2):
        assert isinstance(error, Unfinished) and "cannot be read: the disk failed" in str(error)


def test_every_edit_of_a_manifest_is_lived_with_or_refused(two, tmp_path):
    """By two processes alike, with the newest checkpoint, the one before, or one line."""
    text = (two / "stage-00-update-0000020/checkpoint.json").read_text()
    shutil.copytree(two, tmp_path / "c")
    seen = set()
    for what, edited in edits(text):
        path = tmp_path / "c/stage-00-update-0000020/checkpoint.json"
        path.write_text(edited, encoding="utf-8", errors="surrogatepass")
        found = together(lambda team: Checkpoints(tmp_path / "c", CONFIG).load(0, team), 2)
        refused = [one for one in found if isinstance(one, Exception)]
        assert {type(one) for one in refused} <= {UserError} and len(refused) in (0, 2), (what, found)
        if not refused:
            assert found[0].update == found[1].update
            assert_whole(found[0], found[0].update)
            seen.add(found[0].update)
    assert seen == {10, 20}
