"""The training log: means that depend on nothing but the updates."""

import json

import pytest
import torch
from accelerate import Accelerator

from diffkd.errors import Interrupted
from diffkd.methods.base import Loss
from diffkd.training import log
from diffkd.training.config import Training
from diffkd.training.log import TrainingLog
from tests.training.stages import run_one, untimed


def test_an_interval_is_shared_out_to_more_processes():
    """Resumed by more processes, all of which know that there is something to exchange."""
    first = TrainingLog(torch.device("cpu"))
    first.add([Loss("student", torch.tensor(2.0), {"t": torch.tensor([0.5]), "gap": torch.tensor([3.0])})],
              torch.tensor(4.0))  # fmt: skip
    states = json.loads(json.dumps([first.state()]))
    again = [TrainingLog(torch.device("cpu")) for _ in range(2)]
    for rank, meter in enumerate(again):
        meter.load(states, rank, 2)
    assert all(meter.has_any for meter in again)
    assert again[0].sums.keys() == again[1].sums.keys() == first.sums.keys()
    for key, value in first.sums.items():
        assert (again[0].sums[key] + again[1].sums[key] == value).all() and not again[1].sums[key].any()


def test_a_model_without_noise_levels_logs_plain_means():
    """Without t there are no bins: metrics are means over all examples, the loss a mean of the values."""
    meter = TrainingLog(torch.device("cpu"))
    for value in (2.0, 4.0):
        loss = Loss(
            "student", torch.tensor(value), {"loss": torch.zeros(3), "right": torch.full((3,), value)}
        )
        meter.add([loss], torch.tensor(1.0))
    record = meter.read(Accelerator(), 3)
    assert (record["loss"], record["right"], record["grad_norm"]) == (3, 3, 1)
    assert not [key for key in record if key.endswith("_by_noise")]


def test_gradient_norms_are_compared_with_the_students():
    """Ratios of means; none where the student's gradient is 0, as dmd2's first is, or was never taken."""
    meter = TrainingLog(torch.device("cpu"))

    def record(**norms):
        for network, norm in norms.items():
            meter.add([Loss(network, torch.tensor(1.0))], torch.tensor(norm))
        return meter.read(Accelerator(), 8)

    meter.add([Loss("fake", torch.tensor(1.0))], torch.tensor(9.0))
    found = record(student=2.0, fake=3.0, heads=1.0)
    assert (found["fake_grad_ratio"], found["heads_grad_ratio"]) == (3.0, 0.5)
    assert not [key for key in (*record(student=0.0, fake=3.0), *record(fake=3.0)) if "ratio" in key]


def test_an_update_costs_its_share_of_the_interval(monkeypatch):
    """By the process's own time, in which others on the machine do not count. Fake updates are a part."""
    monkeypatch.setattr(log.time, "process_time", iter([10.0, 16.0, 16.0, 17.0, 17.0]).__next__)
    meter = TrainingLog(torch.device("cpu"))

    def record(*networks):
        for network in networks:
            meter.add([Loss(network, torch.tensor(1.0))], torch.tensor(1.0))
        return meter.read(Accelerator(), 8)["cpu_seconds_per_update"]

    assert record("student", "fake", "student", "fake", "student") == 2
    assert record("student") == 1


def test_a_log_interval_resumes_where_it_stopped(tmp_path):
    """The means of an interval that was interrupted equal those of an unbroken one, to the bit."""
    training = Training(batch_size=8, log_every=12, checkpoint_every=50)
    whole = run_one(tmp_path / "whole", training=training)[2]
    with pytest.raises(Interrupted):
        run_one(tmp_path / "parts", training=training, stop_at=7)
    parts = run_one(tmp_path / "parts", training=training)[2]
    assert len(whole) == 1 and untimed(whole) == untimed(parts)


def test_noise_bins_sort_by_t(tmp_path):
    _, _, records = run_one(tmp_path / "run", updates=12, training=Training(batch_size=8, log_every=12))
    bins = records[0]["loss_by_noise"]
    assert bins[0] is None and all(b > 0 for b in bins[1:])  # t is 1/4, 1/2, 3/4 or 1: none in (0, 1/5]


def test_means_do_not_depend_on_when_they_are_read(tmp_path, monkeypatch):
    """Losses are added up later: however long an interval is, its means are those of the updates."""
    monkeypatch.setattr(log, "PENDING", 5)
    single = run_one(tmp_path / "single", updates=12)[2]
    whole = run_one(tmp_path / "whole", updates=12, training=Training(batch_size=8, log_every=12))[2]
    assert len(single) == 12 and len(whole) == 1
    for key in ("loss", "gap", "grad_norm"):
        mean = sum(record[key] for record in single) / 12
        assert whole[0][key] == pytest.approx(mean, rel=1e-9)
    assert 0.05 < whole[0]["peak_memory_gb"] < 100
    bins = [[record["gap_by_noise"][k] for record in single] for k in range(5)]
    assert [value is None for value in whole[0]["gap_by_noise"]] == [set(b) == {None} for b in bins]
