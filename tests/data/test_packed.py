"""Strings packed into one run of bytes."""

from __future__ import annotations

import os
import tracemalloc

import pytest

from diffkd.data.packed import PackedStrings

STRINGS = ["a red ring", "", "étoile ☆", os.fsdecode(b"no\xfftext"), "\0", "a red ring"]


def test_they_come_back_as_they_were():
    packed = PackedStrings(iter(STRINGS))
    assert len(packed) == 6 and list(packed) == STRINGS and list(reversed(packed)) == STRINGS[::-1]
    assert packed[-2] == "\0" and packed[1:4] == STRINGS[1:4] and packed[::-2] == STRINGS[::-2]
    assert "étoile ☆" in packed and packed.index("") == 1
    for outside in (6, -7):
        with pytest.raises(IndexError):
            packed[outside]


def test_none_are_none():
    packed = PackedStrings(())
    assert not packed and len(packed) == 0 and list(packed) == [] and not any(packed)


def test_a_string_costs_its_bytes_and_eight():
    tracemalloc.start()
    try:
        packed = PackedStrings(f"{number:020d}" for number in range(20_000))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert packed[19_999] == f"{19_999:020d}" and held < 20_000 * 40
