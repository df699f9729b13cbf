"""Times by name: on the host's clock, of an iterator, and of a whole generator."""

import time

import pytest
import torch

import diffkd
from diffkd.generation.generator import ImageGenerator
from diffkd.generation.timing import Timer


def test_times_of_the_host_add_up(monkeypatch):
    ticks = {"now": 100.0}
    monkeypatch.setattr(time, "perf_counter", lambda: ticks["now"])
    timer = Timer(torch.device("cpu"))
    for seconds in (1.5, 0.25, 2.0):
        with timer.host("writing"):
            ticks["now"] += seconds
        with timer.device("network"):
            ticks["now"] += 2 * seconds
        ticks["now"] += 0.125  # of nobody
    with pytest.raises(OSError), timer.host("writing"):
        ticks["now"] += 1
        raise OSError
    assert timer.seconds() == {"writing": 4.75, "network": 7.5} and timer.elapsed() == 12.625
    timer.seconds()["writing"] = 0.0
    assert timer.seconds()["writing"] == 4.75


def test_an_iterators_time_is_its_own(monkeypatch):
    ticks = {"now": 0.0}
    monkeypatch.setattr(time, "perf_counter", lambda: ticks["now"])

    def items():
        for item in (None, 7):
            ticks["now"] += 2
            yield item
        ticks["now"] += 0.5

    timer, found = Timer(torch.device("cpu")), []
    for item in timer.iterate("images", items()):
        found.append(item)
        ticks["now"] += 100  # the consumer's
    assert found == [None, 7] and timer.seconds() == {"images": 4.5}


def test_the_times_of_a_generator_add_up(tmp_path, make_pipeline):
    generator = ImageGenerator(diffkd.load(make_pipeline(tmp_path)), 64, steps=8, batch_size=16)
    generator.prepare()
    timer = generator.timer = Timer(generator.device)
    for _ in generator.batches():
        pass
    spent = timer.seconds()
    assert {"noise", "network", "conversion"} <= spent.keys() and all(v > 0 for v in spent.values())
    assert 0.5 * timer.elapsed() < sum(spent.values()) <= timer.elapsed()
