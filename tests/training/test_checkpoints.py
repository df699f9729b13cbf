"""Checkpoints: what is written comes back to the bit or not at all, whatever happens to the files."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from diffkd.errors import Unfinished, UserError
from diffkd.training import checkpoints, manifest
from diffkd.training.checkpoints import Checkpoints
from tests.refusals import tree

CONFIG = {"out": "runs/x", "seed": 0, "training": {"ema": 0.99, "log_every": 10}, "evaluation": None}


@pytest.fixture
def store(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", CONFIG)


def saved(store, stage, update, tensors, state=None):
    """Saves and waits until it is written."""
    store.save(stage, update, tensors, state or {})
    store.wait()


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


def test_a_checkpoint_comes_back_to_the_bit(store):
    state = {"ema_step": 12, "x": 0.1 + 0.2, "nested": {"a": [1, None]}}
    saved(store, 3, 12, weights(), state)
    found = store.load(3)
    assert found.update == 12 and found.state == state
    assert bits(found.tensors) == bits(weights())


def test_there_is_none_at_first_nor_for_another_stage(store):
    assert store.load(0) is None
    saved(store, 0, 5, weights())
    assert store.load(1) is None
    assert store.load(0).update == 5


def names(store) -> list[str]:
    return sorted(p.name for p in store.folder.iterdir())


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_ones_are_kept(tmp_path, keep):
    store = Checkpoints(tmp_path, CONFIG, keep=keep)
    order = [(0, 90), (0, 100), (0, 1000), (1, 5), (1, 10)]
    for stage, update in order:
        saved(store, stage, update, weights(update))
    assert names(store) == [f"stage-{stage:02d}-update-{update:07d}" for stage, update in order[-keep:]]
    assert store.load(1).update == 10
    saved(store, 1, 10, weights(77), {"again": True})
    found = store.load(1)
    assert found.state == {"again": True} and bits(found.tensors) == bits(weights(77))
    assert len(names(store)) == keep


def test_a_state_that_is_not_json_is_refused_before_anything_is_written(store):
    saved(store, 0, 1, weights(1))
    before = tree(store.folder)
    with pytest.raises(TypeError):
        store.save(0, 3, weights(3), {"no json": object()})
    store.wait()
    assert tree(store.folder) == before


# beside the training ----------------------------------------------------------------------------------


@pytest.fixture
def held_up(monkeypatch):
    """Holds up writing until the test lets it continue."""
    go = threading.Event()
    real = checkpoints.save_file

    def slow(*args, **options):
        assert go.wait(30)
        real(*args, **options)

    monkeypatch.setattr(checkpoints, "save_file", slow)
    return go


def test_saving_does_not_wait_for_the_disk(store, held_up):
    store.save(0, 1, weights(1), {"n": 1})
    store.check()  # nothing to complain of yet
    assert store.load(0) is None
    held_up.set()
    store.wait()
    assert store.load(0).state == {"n": 1}


def test_the_next_save_waits_for_the_previous_one(store, held_up):
    store.save(0, 1, weights(1), {})
    second = threading.Thread(target=store.save, args=(0, 2, weights(2), {}))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    held_up.set()
    second.join(30)
    store.wait()
    assert names(store) == ["stage-00-update-0000001", "stage-00-update-0000002"]


def test_a_failed_write_is_raised_by_the_next_call(store, monkeypatch):
    saved(store, 0, 1, weights(1))

    def fails(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoints, "save_file", fails)
    before = tree(store.folder)
    store.save(0, 2, weights(2), {})
    with pytest.raises(
        Unfinished, match="update-0000002 needs .* Input/output error; the last good one is kept"
    ):
        store.wait()
    store.check()  # once
    assert tree(store.folder) == before
    monkeypatch.undo()
    saved(store, 0, 2, weights(2))
    assert store.load(0).update == 2


def test_the_log_is_on_the_disk_before_a_checkpoint_is_valid(tmp_path):
    seen = []
    store = Checkpoints(tmp_path, CONFIG, before_rename=lambda: seen.append(store.load(0)))
    saved(store, 0, 1, weights(1))
    assert seen == [None] and store.load(0).update == 1


def test_a_full_disk(disk):
    """The last good checkpoint stays, nothing half written is left, the error says what space it needs."""
    store = Checkpoints(disk("3m") / "checkpoints", CONFIG)
    million = {"student": {"w": torch.zeros(250_000)}}
    saved(store, 0, 1, million)
    saved(store, 0, 2, million)
    before = tree(store.folder)
    store.save(0, 3, {"student": {"w": torch.zeros(500_000)}}, {})
    with pytest.raises(Unfinished) as caught:
        store.wait()
    assert "needs 2 MB and could not be written: the disk is full (1" in str(caught.value)
    assert "the last good one is kept: make room" in str(caught.value)
    assert tree(store.folder) == before and store.load(0).update == 2


# what happens to the files ----------------------------------------------------------------------------


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
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(store, caplog, harm, file):
    saved(store, 0, 10, weights(10), {"ema_step": 10})
    saved(store, 0, 20, weights(20), {"ema_step": 20})
    harm(store.folder / "stage-00-update-0000020" / file)
    with caplog.at_level(logging.WARNING, "diffkd"):
        found = store.load(0)
    assert found.update == 10 and found.state == {"ema_step": 10}
    assert bits(found.tensors) == bits(weights(10))
    assert len(caplog.records) == 1 and "stage-00-update-0000020" in caplog.text


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    store = Checkpoints(tmp_path_factory.mktemp("two") / "checkpoints", CONFIG)
    saved(store, 0, 10, weights(10), {"ema_step": 10})
    saved(store, 0, 20, weights(20), {"ema_step": 20})
    return store


FILES = ["student.safetensors", "student-optimizer.safetensors", "ema.safetensors", "checkpoint.json"]


@settings(
    max_examples=400, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    file=st.sampled_from(FILES),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.none() | st.integers(0, 7),
    newest=st.booleans(),
)
def test_any_flipped_bit_and_any_truncation_is_seen(two, tmp_path, caplog, file, place, bit, newest):
    """In either checkpoint: the newest intact one is used, and the damaged one named in a warning."""
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    shutil.copytree(two.folder, tmp_path / "c")
    path = tmp_path / "c" / f"stage-00-update-00000{'20' if newest else '10'}" / file
    content = bytearray(path.read_bytes())
    at = int(place * len(content))
    if bit is None:
        content = content[:at]
    else:
        content[at] ^= 1 << bit
    path.write_bytes(bytes(content))
    caplog.clear()
    found = Checkpoints(tmp_path / "c", CONFIG).load(0)
    meant = {update: weights(update) for update in (10, 20)}
    assert found is not None and bits(found.tensors) == bits(meant[found.update])
    assert found.state == {"ema_step": found.update}
    if newest and found.update == 10:
        assert "stage-00-update-0000020" in caplog.text and len(caplog.records) == 1
    else:  # the other one, or a bit that says nothing, as between two keys
        assert found.update == 20 and not caplog.records
        assert not newest or file == "checkpoint.json"


@pytest.mark.parametrize(
    ("old", "new"), [('"ema_step": 20', '"ema_step": 28'), ('"update": 20', '"update": 28')]
)
def test_a_number_that_changed_in_the_manifest_is_seen(store, caplog, old, new):
    """One bit of a digit: it is still valid JSON, and contradicts no safetensors file."""
    saved(store, 0, 10, weights(10), {"ema_step": 10})
    saved(store, 0, 20, weights(20), {"ema_step": 20})
    path = store.folder / "stage-00-update-0000020" / "checkpoint.json"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    assert store.load(0).update == 10
    assert "stage-00-update-0000020" in caplog.text


# what cannot be read is not damaged ---------------------------------------------------------------------


READS = ["iterdir", "is_dir", "read_text", "stat", "open", "load_file"]
REASONS = [
    (PermissionError(errno.EACCES, "Permission denied"), UserError, "permission denied"),
    (OSError(errno.EIO, "Input/output error"), Unfinished, "the disk failed"),
    (OSError(errno.ESTALE, "Stale file handle"), Unfinished, "the network file system lost it"),
    (OSError(errno.ENODEV, "No such device"), Unfinished, "No such device"),
    (OSError(errno.EMFILE, "Too many open files"), Unfinished, "too many files are open"),
    (SafetensorError("I/O error: Input/output error (os error 5)"), Unfinished, "the disk failed"),
]


@pytest.mark.parametrize(("error", "kind", "says"), REASONS, ids=lambda value: getattr(value, "errno", None))
@pytest.mark.parametrize("read", READS)
def test_one_that_cannot_be_read_ends_the_run(store, monkeypatch, caplog, read, error, kind, says):
    """Whatever part of the newest one it is: it is not passed over, and nothing is lost."""
    saved(store, 0, 10, weights(10))
    saved(store, 0, 20, weights(20))
    before = tree(store.folder)
    newest = store.folder if read == "iterdir" else store.folder / "stage-00-update-0000020"
    place = next((one for one in (checkpoints, manifest) if hasattr(one, read)), Path)
    real = getattr(place, read)

    def failing(path, *args, **options):
        if Path(path) == newest or Path(path).parent == newest:
            raise error
        return real(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, read, failing)
        with pytest.raises(kind, match=says) as caught:
            store.load(0)
    assert str(caught.value).startswith(f"checkpoint {store.folder}")
    assert "cannot be read: " in str(caught.value)
    assert not caplog.records and tree(store.folder) == before


def test_tensors_that_match_their_digest_and_cannot_be_opened(store, monkeypatch):
    saved(store, 0, 10, weights(10))
    monkeypatch.setattr(checkpoints, "load_file", Mock(side_effect=SafetensorError("InvalidHeader")))
    with pytest.raises(UserError, match="cannot be read .InvalidHeader.; repair it, or move it elsewhere"):
        store.load(0)


def test_good_checkpoints_that_were_passed_over_stay(store):
    """A stage that is done again, its student deleted: those of the stages after it are as good as before."""
    for stage, update in ((0, 10), (1, 10), (1, 20)):
        saved(store, stage, update, weights(update))
    shutil.rmtree(store.folder / "stage-00-update-0000010", ignore_errors=True)
    again = Checkpoints(store.folder, CONFIG)
    assert again.load(0) is None
    for update in (5, 10, 15):
        saved(again, 0, update, weights(update))
    kept = ["stage-00-update-0000010", "stage-00-update-0000015"]
    assert names(again) == [*kept, "stage-01-update-0000010", "stage-01-update-0000020"]
    assert again.load(1).update == 20


def test_a_superseded_one_that_cannot_be_deleted(store, monkeypatch, caplog):
    saved(store, 0, 10, weights(10))
    saved(store, 0, 20, weights(20))
    real = shutil.rmtree

    def rmtree(path, *args, **options):
        if Path(path).name.startswith("stage"):
            raise PermissionError(errno.EACCES, "Permission denied")
        real(path, *args, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    saved(store, 0, 30, weights(30))
    assert "update-0000010 is superseded and cannot be deleted" in caplog.text
    assert store.load(0).update == 30


def test_a_renamed_checkpoint_ends_the_run(store):
    """It is whole, and may be all there is."""
    saved(store, 0, 10, weights(10))
    (store.folder / "stage-00-update-0000010").rename(store.folder / "stage-00-update-0000030")
    with pytest.raises(UserError, match="0000030 is stage-00-update-0000010 by its checkpoint.json; give it"):
        store.load(0)


def test_if_all_are_damaged_the_stage_starts_again(store, caplog):
    for update in (10, 20):
        saved(store, 0, update, weights(update))
    for path in store.folder.rglob("ema.safetensors"):
        flipped(path)
    assert store.load(0) is None
    assert "0000010" in caplog.text and "0000020" in caplog.text
    saved(store, 0, 5, weights(5))  # which is kept, although the damaged ones belong to later updates
    assert store.load(0).update == 5 and names(store) == ["stage-00-update-0000005"]


def test_other_files_among_the_checkpoints_are_ignored(store):
    saved(store, 0, 10, weights(10))
    (store.folder / "stage-00-update-0000011").write_text("a file")
    (store.folder / "stage-00-update-latest").mkdir()
    for update in (20, 30):
        saved(store, 0, update, weights(update))
    assert store.load(0).update == 30
    assert (store.folder / "stage-00-update-0000011").exists()


def test_checkpoints_are_ordered_by_their_numbers(store):
    for stage, update in ((9, 10_000_000), (10, 9_999_999), (100, 5)):
        saved(store, stage, update, weights(update))
    assert [p.name for p in store._all()] == ["stage-10-update-9999999", "stage-100-update-0000005"]


def test_a_write_that_fails_for_lack_of_space(store, monkeypatch):
    """For machines where no small file system can be mounted: the library's error, simulated."""
    saved(store, 0, 1, weights(1))

    def full(*args):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoints, "save_file", full)
    before = tree(store.folder)
    store.save(0, 2, {"student": {"w": torch.zeros(500)}}, {})
    with pytest.raises(
        Unfinished, match=r"needs 2 kB and could not be written: the disk is full \(.* free\)"
    ):
        store.wait()
    assert tree(store.folder) == before


# of another making ------------------------------------------------------------------------------------


def rewritten(path, **changes):
    """Rewrites a checkpoint as a diffkd would that puts these into the manifest."""
    content = json.loads(path.read_text())
    del content["digest"]
    content |= changes
    content["digest"] = manifest.digest(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(("schema", "says"), [(99, "a newer diffkd"), (1, "an older diffkd")])
def test_another_schema_is_refused_rather_than_skipped(store, schema, says):
    saved(store, 0, 10, weights(10))
    saved(store, 0, 20, weights(20))
    before = tree(store.folder)
    rewritten(store.folder / "stage-00-update-0000020" / "checkpoint.json", schema=schema)
    with pytest.raises(
        UserError, match=rf"0000020 was written by {says} \(schema {schema}, this one reads 2 and 3\)"
    ):
        store.load(0)
    assert tree(store.folder).keys() == before.keys()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"training": {"ema": 0.5, "log_every": 10}}, r"training\.ema"),
        ({"training": {"log_every": 10}, "seed": 3}, r"seed, training\.ema"),
    ],
)
def test_another_config_is_refused_by_its_keys(store, changed, named):
    saved(store, 0, 10, weights(10))
    other = Checkpoints(store.folder, {**CONFIG, **changed})
    with pytest.raises(UserError, match=rf"belongs to another config \({named} differ\)"):
        other.load(0)


@pytest.mark.parametrize(
    "changed",
    [
        {"out": "moved"},
        {"training": {"ema": 0.99, "log_every": 7}},
        {"evaluation": {"samples": 10}, "pictures": 3},
    ],
)
def test_a_change_that_affects_no_student_is_accepted(store, changed):
    saved(store, 0, 10, weights(10))
    assert Checkpoints(store.folder, {**CONFIG, **changed}).load(0).update == 10
