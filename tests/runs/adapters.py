"""What holds for students that are adapters, of whatever family."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import diffkd
from diffkd.models.lora_files import unprefixed
from diffkd.models.source import ADAPTER
from tests.runs.tiny import log, same, signal_at

GIVEN = (
    "student={kind: lora, rank: 2}", "method.steps=[2]", "method.learning_rate=1e-2", "pictures=0",
    "cache=cache",
)  # fmt: skip


def assert_trained(
    cli: Callable[..., Any], patch: pytest.MonkeyPatch, here: Path, idle: Collection[str] = ()
) -> None:
    """Of the run of two updates in `run.yaml`: its student is W + BA of what learned, which is every layer
    but those that are idle; stopped after an update, with a checkpoint of the adapter alone, and resumed it
    has the same bits; and the same numbers where blocks are computed again for their gradients."""

    def run(out: str, *more: str) -> int:
        code: int = cli("distill", "run.yaml", *GIVEN, f"out={out}", *more).code
        return code

    assert run("whole") == 0
    with patch.context() as stopping:
        signal_at(stopping, "2-steps", 1, send=[signal.SIGTERM])
        assert run("broken") == 130
    for file in (here / "broken" / "checkpoints").glob("*/*.safetensors"):
        assert all(".lora_" in key for key in load_file(file)), file.name
    assert run("broken") == 0
    assert run("again", "training.gradient_checkpointing=true") == 0
    whole, broken, again = (
        unprefixed(load_file(here / out / "students" / "2-steps" / ADAPTER))
        for out in ("whole", "broken", "again")
    )
    assert same(whole, broken) and log(here / "whole") == log(here / "broken")
    assert all(torch.allclose(value, again[key], atol=1e-6) for key, value in whole.items())
    ups = {key.partition(".lora_B.")[0]: value for key, value in whole.items() if ".lora_B." in key}
    assert {layer for layer, value in ups.items() if value.abs().max() < 1e-3} == {*idle}
    assert len(ups) > len(idle)

    base, made = (
        diffkd.load(here / place).network.state_dict() for place in ("teacher", "whole/students/2-steps")
    )
    for key, down in whole.items():
        if ".lora_A." in key:
            weight = key.replace(".lora_A.", ".")
            change = whole[key.replace(".lora_A.", ".lora_B.")].flatten(1).double() @ down.flatten(1).double()
            expected = base[weight] + change.reshape(base[weight].shape)
            assert (made[weight] - expected).abs().max() <= 1e-6, key
