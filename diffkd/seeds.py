"""Where every random number of a stage comes from."""

from __future__ import annotations

import hashlib

import torch


def derived_seed(*parts: int) -> int:
    """A 63-bit seed from (seed, stage, update, micro-batch): nearby numbers give unrelated ones."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_of(key: tuple[int, int, int], micro: int) -> torch.Generator:
    """Of one micro-batch. key: (seed, stage, update)."""
    return torch.Generator().manual_seed(derived_seed(*key, micro))
