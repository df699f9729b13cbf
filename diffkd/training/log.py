"""What a training run logs: sums of an interval, kept on the device until they are read."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from diffkd.io.environment import peak_rss
from diffkd.methods.base import Loss

KEPT = 64  # updates whose losses wait to be added up
NOISE_BINS = 5  # equal bins of t in the log


class TrainingLog:
    """What an interval of the log sums up. It is kept as it comes, on the device, and added up once read: an
    update costs little for it. Each value is added on its own, in order, so that the sums do not depend on
    when they are read: a run that was resumed logs what an unbroken one does, to the bit.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, np.ndarray] = {}  # (2, bins): sums and counts
        self._restart()

    def _restart(self) -> None:
        self.sums = {}
        self.kept: list[tuple[list[Loss], Tensor]] = []
        self.started = time.perf_counter()
        self.updates = 0

    def add(self, losses: list[Loss], norm: Tensor) -> None:
        self.updates += losses[0].network == "student"
        losses = [Loss(loss.network, loss.value.detach(), loss.metrics) for loss in losses]
        self.kept.append((losses, norm.detach()))
        if len(self.kept) >= KEPT:
            self._add_up()

    @property
    def has_any(self) -> bool:
        """False where every update of the interval was skipped."""
        return bool(self.sums or self.kept)

    def _add_up(self) -> None:
        """The kept losses into the sums, those of one kind together. A wait for the device."""
        kinds: dict[str, list[tuple[list[Loss], Tensor]]] = {}
        for losses, norm in self.kept:
            kinds.setdefault(losses[0].network, []).append((losses, norm))
        self.kept = []
        for network, found in kinds.items():
            prefix = "" if network == "student" else f"{network}_"
            every = [loss for losses, _ in found for loss in losses]
            self._sum(f"{prefix}grad_norm", _host([norm[None] for _, norm in found]))
            self._sum(f"{prefix}loss", _host([loss.value[None] for loss in every]))
            for key in every[0].metrics:  # in one order in all processes
                values = _host([loss.metrics[key] for loss in every])
                if key != "t" and "t" in every[0].metrics:
                    t = _host([loss.metrics["t"] for loss in every])
                    self._sum(f"{prefix}{key}_by_noise", values, noise_bin(t), NOISE_BINS)
                elif key not in ("t", "loss"):  # of a model that knows no noise; the loss has been added
                    self._sum(f"{prefix}{key}", values)

    def _sum(self, key: str, values: np.ndarray, bins: Any = 0, count: int = 1) -> None:
        sums = self.sums.setdefault(key, np.zeros((2, count)))
        bins = np.broadcast_to(bins, values.shape)
        np.add.at(sums[0], bins, values)
        np.add.at(sums[1], bins, 1)

    def read(self, accelerator: Accelerator, batch_size: int) -> dict[str, Any]:
        """The means of the interval, and a new one begins."""
        self._add_up()
        record: dict[str, Any] = {}
        for key, value in self.sums.items():
            sums = torch.from_numpy(value).to(self.device)
            total, count = accelerator.reduce(sums, reduction="sum").cpu()
            means = (total / count).tolist()
            if key.endswith("_by_noise"):
                record[key] = [None if n == 0 else m for m, n in zip(means, count.tolist(), strict=True)]
                whole = key.removesuffix("_by_noise")
                record.setdefault(whole, float(total.sum() / count.sum()))
            else:
                record[key] = means[0]
        seconds = time.perf_counter() - self.started
        record["images_per_second"] = self.updates * batch_size / max(seconds, 1e-9)
        record["peak_memory_gb"] = round(_peak_memory(self.device), 3)
        self._restart()
        return record

    def state(self) -> dict[str, Any]:
        """The interval so far, of this process."""
        self._add_up()
        return {key: value.tolist() for key, value in self.sums.items()}

    def load(self, states: list[dict[str, Any]], rank: int, processes: int) -> None:
        """states: of every process then, of which there may be another number now."""
        same = len(states) == processes
        for there, state in enumerate(states):
            mine = there == rank if same else rank == 0
            for key, value in state.items():  # all have all keys: sums are exchanged key by key
                self.sums[key] = self.sums.get(key, 0) + np.asarray(value) * mine


def _host(parts: list[Tensor]) -> np.ndarray:
    found: np.ndarray = torch.cat(parts).detach().double().cpu().numpy()
    return found


def noise_bin(t: np.ndarray) -> np.ndarray:
    """Which of NOISE_BINS equal bins of (0, 1] each noise level is in."""
    return (np.ceil(t * NOISE_BINS).astype(np.int64) - 1).clip(0, NOISE_BINS - 1)


def _peak_memory(device: torch.device) -> float:
    """GB: allocated on the device, or where that is this very machine's, of the process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return peak_rss() / 1e9
