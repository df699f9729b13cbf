"""What a run costs: CPU seconds of its log, and passes through networks, counted while it trains.

A pass is one of the student's network over a batch. All arithmetic of convolutions, matrix products and
attention is counted and divided by that of one such pass: a backward pass is about two, one that needs no
gradients of weights about one, and heads and other small networks count as the little that they are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import stages
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count

from diffkd.core import samplers
from diffkd.core.denoiser import Denoiser
from diffkd.data.images import Images
from diffkd.methods.base import Method, Stage
from diffkd.models.sizes import CPU_ATTENTION
from diffkd.training.config import Training

UPDATES, BATCH = 2, 32  # that passes are counted in


def _backward_attention(grad: Any, query: Any, key: Any, value: Any, *more: Any, **options: Any) -> int:
    count: int = sdpa_backward_flop_count(grad, query, key, value)
    return count


ATTENTION = CPU_ATTENTION | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_attention
}


@dataclass(frozen=True)
class Passes:
    """training: of all updates. pairs: of drawing those that are learned from. update: of one, by stage."""

    training: float
    pairs: float
    update: tuple[float, ...]

    @property
    def total(self) -> float:
        return self.training + self.pairs


def passes(plan: list[tuple[Method, Stage]], teacher: Denoiser, images: Images, training: Training) -> Passes:
    """Of a run of these stages. Each is trained for a few updates of a small batch, from the teacher's own
    weights: the number of passes depends on neither."""
    few = training.model_copy(update={"batch_size": BATCH, "micro_batches": None})
    one = _one_pass(teacher, BATCH)
    update, trained, drawn = [], 0.0, 0.0
    for method, stage in plan:
        brief = replace(stage, updates=UPDATES)
        nets = stages.networks_of(method, brief, teacher)
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            stages.train(method, brief, nets, images, few)
        update.append(counter.get_total_flops() / UPDATES / one)
        trained += update[-1] * stage.updates
        if stage.pairs is not None:
            evaluations = samplers.nfe(stage.pairs.sampler, stage.pairs.steps) * (1 + (stage.guidance != 1))
            drawn += stage.pairs.count * evaluations / training.batch_size
    return Passes(trained, drawn, tuple(update))


def _one_pass(teacher: Denoiser, batch: int) -> int:
    x, t, cond = teacher.example_inputs()
    one = {key: value.repeat(batch) for key, value in cond.items()}
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter, torch.no_grad():
        teacher(x.repeat(batch, 1, 1, 1), t.repeat(batch), **one)
    return int(counter.get_total_flops())


def cpu_seconds(log: Path) -> float:
    """Of training, by a run's log.jsonl: of the updates that count, however often it was interrupted."""
    total, before = 0.0, dict[int, int]()
    for line in log.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "event" not in record:
            index = record["stage_index"]
            total += (record["update"] - before.get(index, 0)) * record["cpu_seconds_per_update"]
            before[index] = record["update"]
    return total


def seconds_with_pairs(log: Path, counted: Passes) -> float:
    """CPU seconds of training and of drawing the pairs, whose passes take as long as those of training."""
    return cpu_seconds(log) * counted.total / counted.training
