"""scripts/bench_lora.py trains what it says: a whole student, or an adapter whose size goes with its rank."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from bench_lora import CHANNELS, measured, train  # noqa: E402


def test_what_learns():
    whole, two, four = (
        train("progressive", kind, rank, 1, [32, 32, 32])
        for kind, rank in (("copy", 1), ("lora", 2), ("lora", 4))
    )
    assert whole > 5 * four and four == 2 * two > 0


@pytest.mark.slow
def test_an_adapter_takes_at_most_0_6_of_the_memory_of_a_whole_student():
    """The most that a process of each had, everything included: the first row of docs/lora.md's table."""
    sizes = ["--rank", "32", "--updates", "2", "--channels", *map(str, CHANNELS)]
    whole, adapter = (measured("--one", "progressive", kind, *sizes) for kind in ("copy", "lora"))
    assert whole[0] > 100e6 and 8e6 < adapter[0] < 9e6
    assert adapter[1] <= 0.6 * whole[1]
