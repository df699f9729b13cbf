"""A training that goes wrong: updates that are skipped and whose they were, a loss that leaves its path."""

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
from diffkd.data.images import Images
from diffkd.errors import UserError
from diffkd.io.text import log
from diffkd.methods.base import Loss
from diffkd.training.config import Training
from diffkd.training.log import NOISE_BINS, noise_bin

WINDOW = 200  # updates whose median the loss is compared with
LEAST = 20  # of them, before there is a median to speak of
TIMES, LONG = 10.0, 50  # this many times the median for that many updates is out of the ordinary


class NonFinite(UserError):
    """Losses or gradients that are no numbers, more often in a row than may be skipped."""


class DivergenceMonitor:
    """Counts what a stage's updates do, the same in every process and in a run that was resumed.

    most: updates in a row that may be skipped.
    """

    def __init__(self, stage: str, most: int) -> None:
        self.stage, self.most = stage, most
        self.in_a_row = 0
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.high = 0
        self.warned = False

    def good(self, loss: float, update: int, *, speaks: bool) -> None:
        """An update that was done. loss: the student's, of all processes. speaks: whether to warn."""
        self.in_a_row = 0
        usual = median(self.losses) if len(self.losses) >= LEAST else float("inf")
        self.losses.append(loss)
        self.high = self.high + 1 if loss > TIMES * usual else 0
        if self.high == LONG and not self.warned:
            self.warned = True
            if speaks:
                log.warning(
                    "stage %s: the loss has been more than %g times its median (%.3g) for %d updates, up to "
                    "update %d (%.3g); a lower method.learning_rate may keep it down",
                    self.stage, TIMES, usual, LONG, update, loss,
                )  # fmt: skip

    def bad(self, what: str) -> None:
        """An update that was skipped. what: went wrong, where. Raises NonFinite where it is one too many."""
        self.in_a_row += 1
        if self.in_a_row > self.most:
            raise NonFinite(
                f"{what}; {self.most} updates in a row were skipped before (training.max_skipped): lower "
                "method.learning_rate, or look at these images (the last good checkpoint is kept)"
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
    images: Images,
    training: Training,
    key: tuple[int, int, int],
) -> dict[str, Any]:
    """Which network's loss, the noise level of its worst example, and the images that it was of, over all
    processes; where no example says that it is no number, those of the whole batch."""
    parts = training.parts(accelerator.num_processes)
    first = accelerator.process_index * (parts // accelerator.num_processes)
    found: list[tuple[bool, float, int]] = []  # whether it is the culprit, t, index
    for micro, loss in enumerate(losses, first):
        indices = images.indices(training.batch_size // parts, generator_for(key, micro)).tolist()
        t = loss.metrics.get("t", torch.zeros(len(indices))).tolist()
        values = loss.metrics.get("loss", torch.zeros(len(indices))).tolist()
        found += [(not math.isfinite(v), at, i) for v, at, i in zip(values, t, indices, strict=True)]
    every = gather_object(found)
    culprits = [one for one in every if one[0]] or every
    place = int(noise_bin(np.asarray(culprits[0][1])))
    return {
        "network": losses[0].network,
        "noise_bin": [place / NOISE_BINS, (place + 1) / NOISE_BINS],
        "t": culprits[0][1],
        "images": [index for _, _, index in culprits],
    }


def describe_nonfinite(stage: str, update: int, bad: Mapping[str, Any]) -> str:
    low, high = bad["noise_bin"]
    shown = ", ".join(map(str, bad["images"][:16])) + (", ..." if len(bad["images"]) > 16 else "")
    return (
        f"the loss or gradient of network {bad['network']} in stage {stage} became NaN or infinite at update "
        f"{update}, noise level t = {bad['t']:.4g} (bin {low:g} to {high:g}), images {shown}"
    )
