"""scripts/bench_lora.py trains what it says: a whole student, or an adapter whose size goes with its rank."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from bench_lora import train  # noqa: E402


def test_what_learns():
    whole, two, four = (
        train("progressive", kind, rank, 1, [32, 32, 32])
        for kind, rank in (("copy", 1), ("lora", 2), ("lora", 4))
    )
    assert whole > 5 * four and four == 2 * two > 0
