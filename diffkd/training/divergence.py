"""Training that diverges: losses that are not finite, and losses far above their median."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from diffkd.core.noise import generator_for
from diffkd.data.images import Examples
from diffkd.errors import UserError
from diffkd.io.text import log
from diffkd.methods.base import Loss
from diffkd.training.config import Training
from diffkd.training.log import NOISE_BINS, noise_bin

WINDOW = 200  # updates over which the median loss is taken
MIN_UPDATES = 20  # before the median means anything
FACTOR, PATIENCE = 10.0, 50  # a loss this many times its median size for that many updates gets a warning


class NonFinite(UserError):
    """Losses or gradients were NaN or infinite in more updates in a row than may be skipped."""


class DivergenceMonitor:
    """Follows a stage's updates, the same in every process and in a run that was resumed.

    max_skipped: updates in a row that may be skipped.
    """

    def __init__(self, stage: str, max_skipped: int) -> None:
        self.stage, self.max_skipped = stage, max_skipped
        self.in_a_row = 0
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.high = 0
        self.warned = False

    def completed(self, loss: float, update: int, *, warn: bool) -> None:
        """loss: the student's, averaged over all processes, of either sign: its size counts.

        warn: whether this process writes the warning.
        """
        self.in_a_row = 0
        typical = median(map(abs, self.losses)) if len(self.losses) >= MIN_UPDATES else float("inf")
        self.losses.append(loss)
        self.high = self.high + 1 if abs(loss) > FACTOR * typical else 0
        if self.high == PATIENCE and not self.warned:
            self.warned = True
            if warn:
                log.warning(
                    "stage %s: the loss has been more than %g times its median (%.3g) for %d updates, up to "
                    "update %d (%.3g); a lower method.learning_rate may prevent it",
                    self.stage, FACTOR, typical, PATIENCE, update, loss,
                )  # fmt: skip

    def skipped(self, reason: str) -> None:
        """Raises NonFinite, with the reason, for one skipped update in a row too many."""
        self.in_a_row += 1
        if self.in_a_row > self.max_skipped:
            raise NonFinite(
                f"{reason}; {self.max_skipped} updates in a row were skipped before (training.max_skipped): "
                "lower method.learning_rate, or look at these images (the last good checkpoint is kept)"
            )

    def state(self) -> dict[str, Any]:
        return {
            "in_a_row": self.in_a_row, "losses": list(self.losses), "high": self.high, "warned": self.warned
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        self.in_a_row, self.high, self.warned = state["in_a_row"], state["high"], state["warned"]
        self.losses = deque(state["losses"], maxlen=WINDOW)


def nonfinite_examples(
    accelerator: Accelerator,
    losses: list[Loss],
    images: Examples,
    training: Training,
    key: tuple[int, int, int],
) -> dict[str, Any]:
    """The log record of a skipped update, over all processes.

    network: whose loss it was. t, noise_bin: of the first example whose loss is not finite. images: indices
    of all such examples; of the whole batch if every example's own loss is finite.
    """
    parts = training.parts(accelerator.num_processes)
    first = accelerator.process_index * (parts // accelerator.num_processes)
    examples: list[tuple[bool, float, int]] = []  # whether it is not finite, t, index
    for micro, loss in enumerate(losses, first):
        indices = images.indices(training.batch_size // parts, generator_for(key, micro)).tolist()
        times = loss.metrics.get("t", torch.zeros(len(indices))).tolist()
        values = loss.metrics.get("loss", torch.zeros(len(indices))).tolist()
        examples += [(not math.isfinite(v), t, i) for v, t, i in zip(values, times, indices, strict=True)]
    batch = gather_object(examples)
    nonfinite = [example for example in batch if example[0]] or batch
    noise_level = nonfinite[0][1]
    position = int(noise_bin(np.asarray(noise_level)))
    return {
        "network": losses[0].network,
        "noise_bin": [position / NOISE_BINS, (position + 1) / NOISE_BINS],
        "t": noise_level,
        "images": [index for _, _, index in nonfinite],
    }


def describe_nonfinite(stage: str, update: int, examples: Mapping[str, Any]) -> str:
    low, high = examples["noise_bin"]
    indices = examples["images"]
    shown = ", ".join(map(str, indices[:16])) + (", ..." if len(indices) > 16 else "")
    return (
        f"the loss or gradient of network {examples['network']} in stage {stage} became NaN or infinite at "
        f"update {update}, noise level t = {examples['t']:.4g} (bin {low:g} to {high:g}), images {shown}"
    )
