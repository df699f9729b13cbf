"""The training log: means of losses and metrics over an interval, kept on the device until they are read."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from diffkd.io.environment import peak_rss
from diffkd.methods.base import Loss

PENDING = 64  # losses that wait on the device before they are added up
NOISE_BINS = 5  # equal bins of t in the log


class TrainingLog:
    """Sums of losses and metrics over a log interval.

    Values stay on the device until they are read, so that an update costs next to nothing. Each is then added
    on its own, in order: the sums do not depend on when they are read, and a resumed run logs what an
    unbroken one does, to the bit.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, np.ndarray] = {}  # (2, bins): sums and counts
        self._reset()

    def _reset(self) -> None:
        self.sums = {}
        self.pending: list[tuple[list[Loss], Tensor]] = []
        self.started, self.cpu_started = time.perf_counter(), time.process_time()
        self.updates = 0

    def add(self, losses: list[Loss], norm: Tensor) -> None:
        self.updates += losses[0].network == "student"
        losses = [Loss(loss.network, loss.value.detach(), loss.metrics) for loss in losses]
        self.pending.append((losses, norm.detach()))
        if len(self.pending) >= PENDING:
            self._add_up()

    @property
    def has_any(self) -> bool:
        """False if every update of the interval was skipped."""
        return bool(self.sums or self.pending)

    def _add_up(self) -> None:
        """Adds the pending losses to the sums, network by network. Waits for the device."""
        networks: dict[str, list[tuple[list[Loss], Tensor]]] = {}
        for losses, norm in self.pending:
            networks.setdefault(losses[0].network, []).append((losses, norm))
        self.pending = []
        for network, updates in networks.items():
            prefix = "" if network == "student" else f"{network}_"
            losses = [loss for parts, _ in updates for loss in parts]
            self._sum(f"{prefix}grad_norm", _host([norm[None] for _, norm in updates]))
            self._sum(f"{prefix}loss", _host([loss.value[None] for loss in losses]))
            for key in losses[0].metrics:  # in the same order in all processes
                values = _host([loss.metrics[key] for loss in losses])
                if key != "t" and "t" in losses[0].metrics:
                    t = _host([loss.metrics["t"] for loss in losses])
                    self._sum(f"{prefix}{key}_by_noise", values, noise_bin(t), NOISE_BINS)
                elif key not in ("t", "loss"):  # a model without noise levels; the loss was added above
                    self._sum(f"{prefix}{key}", values)

    def _sum(self, key: str, values: np.ndarray, bins: Any = 0, count: int = 1) -> None:
        sums = self.sums.setdefault(key, np.zeros((2, count)))
        bins = np.broadcast_to(bins, values.shape)
        np.add.at(sums[0], bins, values)
        np.add.at(sums[1], bins, 1)

    def read(self, accelerator: Accelerator, batch_size: int) -> dict[str, Any]:
        """The means of the interval over all processes, the gradient norms of other networks over the
        student's, its speed, and this process's CPU time of all its threads; starts a new interval."""
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
        for key in [key for key in record if key.endswith("_grad_norm")]:
            if record.get("grad_norm"):  # none where every update of the student was skipped
                record[key.replace("_norm", "_ratio")] = record[key] / record["grad_norm"]
        seconds = time.perf_counter() - self.started
        record["images_per_second"] = self.updates * batch_size / max(seconds, 1e-9)
        record["cpu_seconds_per_update"] = (time.process_time() - self.cpu_started) / max(self.updates, 1)
        record["peak_memory_gb"] = round(_peak_memory(self.device), 3)
        self._reset()
        return record

    def state(self) -> dict[str, Any]:
        """This process's sums of the interval so far."""
        self._add_up()
        return {key: value.tolist() for key, value in self.sums.items()}

    def load(self, states: list[dict[str, Any]], rank: int, processes: int) -> None:
        """states: one for each process that the run had then; it may have another number of them now."""
        same_number = len(states) == processes
        for owner, state in enumerate(states):
            own = owner == rank if same_number else rank == 0
            for key, value in state.items():  # every process has every key: sums are exchanged key by key
                self.sums[key] = self.sums.get(key, 0) + np.asarray(value) * own


def _host(parts: list[Tensor]) -> np.ndarray:
    values: np.ndarray = torch.cat(parts).detach().double().cpu().numpy()
    return values


def noise_bin(t: np.ndarray) -> np.ndarray:
    """The index of the bin that each noise level is in, of NOISE_BINS equal ones over (0, 1]."""
    return (np.ceil(t * NOISE_BINS).astype(np.int64) - 1).clip(0, NOISE_BINS - 1)


def _peak_memory(device: torch.device) -> float:
    """In GB: allocated on a CUDA device, else the peak resident size of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return peak_rss() / 1e9
